"""A run made public: the checks before it starts, the card beside its encoder, and the push at its end."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, constants, get_token
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import CARD_NAME
from ..distributed import broadcast_object, is_main, say
from ..models import AccelViTConfig
from ..objectives import OBJECTIVES
from ..report import plot_schedule
from ..run_folder import RunFolder
from ..utils.errors import SettingError
from ..utils.redact import without_local_paths
from .card import FIGURES, HERE, read_run, schedule_of, write_card
from .repository import STATE_FOLDER, Files, HubRepository, PushFailed, PushRefused, patiently, push_failure

logger = logging.getLogger(__name__)


@dataclass
class Publication:
    """A run folder and the repository on the Hub that it is or will be pushed to.

    Args:
        output_dir: the run's folder.
        name: "user/name", or "name" in the account of the token; default: the folder's name.
        private: whether a repository that does not exist yet becomes private.
        license: the licence that the card states.
        optimizer: whether the last checkpoint is pushed with its optimizer, so that others can resume from it.
        in_python: whether messages are for a program that calls a trainer, and not for a command.
        by_call: whether the program itself calls `push_to_hub()`, and no setting asks for it.
    """

    output_dir: str | Path
    name: str | None = None
    private: bool = False
    license: str = "apache-2.0"
    optimizer: bool = False
    in_python: bool = False
    by_call: bool = False
    run: RunFolder = field(init=False)
    repository: HubRepository = field(init=False)

    def __post_init__(self) -> None:
        self.run = RunFolder(self.output_dir)
        self.repository = HubRepository(self.name or self.run.path.resolve().name, self.private, self.run.hub)

    def start(self) -> None:
        """Find out now what no later attempt would cure. All processes of a launch must call it.

        A network that is down is only a warning: training goes on, and each checkpoint tries again.

        Raises:
            SettingError: offline mode, no token or one that may not write, an impossible name or licence.
        """
        refusal = None
        if is_main():
            for left_over in self.run.hub.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(left_over)
            try:
                self.check()
            except PushRefused as error:
                refusal = str(error)
            except PushFailed as error:
                logger.warning(
                    "The Hub cannot be reached now (%s). Training goes on; each checkpoint tries again", error
                )
        refusal = broadcast_object(refusal)
        if refusal:
            raise SettingError(refusal)

    def check(self) -> None:
        """Make sure that the repository exists and takes the licence.

        Raises:
            PushRefused: the Hub will not take the run; the message names the setting and the fix.
            PushFailed: the Hub cannot be reached.
        """
        yes, no = (True, False) if self.in_python else ("true", "false")
        asked = "push_to_hub()" if self.by_call else f"push_to_hub={yes}"
        key = f"{asked}, hub_model_id={self.repository.name!r}" + " (the folder's name)" * (not self.name)
        if constants.HF_HUB_OFFLINE:
            later = "call trainer.push_to_hub()" if self.in_python else f"hf-accel card checkpoint={self.run} {asked}"
            remedy = "" if self.by_call else f", or set push_to_hub={no}, and after training push by: {later}"
            raise PushRefused(f"{key}: HF_HUB_OFFLINE is set; unset it{remedy}")
        if get_token() is None:
            raise PushRefused(f"{key}: there is no token; log in by `hf auth login`, or set HF_TOKEN")
        try:
            self.repository.open()
        except PushRefused as error:
            fix = "is the token valid, may it write, and is the name user/name of your own?"
            raise PushRefused(f"{key}: the Hub refuses: {error} ({fix})") from error
        try:
            ModelCard(f"---\nlicense: {json.dumps(self.license)}\n---\n").validate()
        except ValueError as error:
            raise PushRefused(f"license={self.license!r}: the Hub refuses: {' '.join(str(error).split())}") from error
        except Exception as error:
            raise push_failure(error) from error

    def complete_final(self, results: Mapping[str, Any]) -> bool:
        """Write figures and card beside the encoder in final/.

        The card's code loads the repository that the run was or will be pushed to, if that is known, else this folder.

        Returns:
            Whether the card was written: a card that somebody has taken over stays as it is.
        """
        final, repo_id = self.run.final, self.repository.repo_id
        config = AccelViTConfig.from_pretrained(final)
        schedule = schedule_of(results, config)
        if "units_per_image" in results:  # earlier versions did not write it
            relative = [units / results["units_per_image_uncompressed"] for units in results["units_per_image"]]
            costs = dict(zip((stage.strategy for stage in schedule.stages), relative, strict=True))
            objective = OBJECTIVES.get(results["objective"])
            has_target = bool(objective and objective.has_target_branch)
            path = self.run.path / "schedule"
            plot_schedule(schedule, costs, config.image_size, path, has_target_branch=has_target)
        for name in FIGURES:
            if (self.run.path / name).exists():
                shutil.copy(self.run.path / name, final)
        run = read_run(self.run, results, config)
        name = repo_id.split("/")[-1] if repo_id else run.name
        run = replace(run, name=name, recipe={**run.recipe, "license": self.license})
        return write_card(run, final / CARD_NAME, repo_id)

    def publish(self) -> None:
        """Push a complete run, unless the Hub has it already. Only the main process of a launch does so.

        Raises:
            PushFailed: with what to do; nothing is lost.
        """
        if int(os.environ.get("RANK", 0)):  # The process group has ended with the training and cannot be asked.
            return
        repository = self.repository
        try:
            repository.drop_waiting()
            if repository.repo_id is None:
                patiently(self.check)
            results = self.run.read_results()
            self.complete_final(results)
            files = self.final_files()
            if repository.holds(files):
                say(f"{repository.marker()['url']} holds all of it (remove {repository.folder} to push it again)")
                return
            patiently(self.check)
            message = f"{results['steps']} steps, {results['units']:,.0f} units"
            url = patiently(partial(repository.push, files, message))
        except PushFailed as error:
            again = "call trainer.push_to_hub()" if self.in_python else "launch the same command again"
            raise type(error)(
                f"{error}. The run itself is complete, and all of it is in {self.run}: {again} to push"
            ) from error
        say(f"Pushed to {url}")

    def final_files(self) -> Files:
        """Return final/, recipe and results without paths of this machine, and the optimizer if it was asked for."""
        run, folders = self.run, [(self.run.final, "")]
        checkpoint = run.last_complete_checkpoint() if self.optimizer else None
        if checkpoint:
            folders.append((checkpoint, f"{STATE_FOLDER}/"))
        files: dict[str, Path | bytes] = {
            prefix + path.relative_to(folder).as_posix(): path
            for folder, prefix in folders
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for path in (run.results, run.log_history):
            values = without_local_paths(json.loads(path.read_text()))
            files[path.name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
        files[run.recipe.name] = public_yaml(run.read_recipe())
        if CARD_NAME in files:
            text = name_repository((run.final / CARD_NAME).read_text(encoding="utf-8"), str(self.repository.repo_id))
            files[CARD_NAME] = text.encode()
        return files


def name_repository(card: str, repo_id: str) -> str:
    """Return a card whose code loads the repository where it loaded a folder of this machine."""
    return re.sub(rf"^model_id = .*{re.escape(HERE)}$", f"model_id = {json.dumps(repo_id)}", card, flags=re.MULTILINE)


def public_yaml(recipe: Mapping[str, Any]) -> bytes:
    """Return a recipe as YAML without the paths of this machine."""
    return yaml.safe_dump(without_local_paths(recipe), sort_keys=False, allow_unicode=True).encode()
