"""Numbers of things, in words."""


def count_of(number: int, noun: str) -> str:
    """Write a number and what it counts: "1 class", "2 classes", "1,000 stages"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
