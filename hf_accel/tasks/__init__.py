"""The tasks of recipes, and the commands that take no recipe; each is a file of this folder."""

TASKS = {
    "pretrain": ("tasks.pretrain", "pretrain"),
    "search": ("tasks.search", "search"),
    "evaluate": ("tasks.evaluate", "evaluate"),
    "export": ("tasks.export", "export"),
    "card": ("tasks.card", "card"),
    "cost": ("tasks.cost", "cost_report"),
    "embed": ("tasks.embed", "embed"),
    "pack": ("tasks.pack", "pack"),
    "views": ("tasks.views", "views"),
    "explore": ("tasks.explore", "explore"),
}
"""For each recipe's task the module of hf_accel and the function in it, which takes the recipe."""

PREVIEWS = {"plan": ("tasks.plan", "plan", "Predict steps, time and memory of a pretraining run, and train nothing.")}
"""For each command that takes the recipe of a pretraining run the module of hf_accel, the function, and its summary."""

COMMANDS = {
    "init": ("tasks.init", "init", "Look at a folder of images and at the device, and write a recipe that fits."),
    "compare": ("tasks.compare", "compare_runs", "Make one table and one figure of finished runs."),
    "list": ("tasks.list", "print_list", "Print tasks, shipped recipes, presets and objectives."),
    "doctor": ("tasks.doctor", "run_checks", "Check the installation and, if one is named, a pretraining recipe."),
    "env": ("tasks.env", "print_environment", "Print versions, devices, threads and settings, for a bug report."),
}
"""For each command the module of hf_accel, the function in it, which takes a parser and the words, and its summary."""
