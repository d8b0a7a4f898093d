"""The commands in README, docs and the comments of recipes, found by a parser."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/README.md")
RECIPES = "recipes/**/*.yaml"

PROGRAMS = (
    *("accelerate", "python", "python3", "torchrun", "hf-accel", "pytest", "make", "sbatch", "srun", "bash", "sh"),
    *("pip", "uv", "conda", "hf", "huggingface-cli", "git", "docker", "curl", "wget", "cd", "export", "source", "kill"),
)
"""What a line or a span of code begins with if it is a command."""

NAMES = ("accelerate launch", "accelerate config")
"""Spans that name a program and launch nothing."""

SHELLS = ("", "bash", "sh", "shell", "console")
"""Languages of a fenced block in which every line is a command."""


@dataclass(frozen=True)
class Command:
    """One command: where it stands, and its text on one line."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        """Without settings of the environment before it."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", words[0]):
            words = words[1:]
        return words


def is_command(text: str) -> bool:
    """Whether a span of code is a command, or the arguments of one that name a task."""
    words = re.sub(r"^(?:[A-Z][A-Z0-9_]*=\S* )+", "", text).split()
    if " ".join(words) in NAMES or not words:
        return False
    return words[0].startswith("task=") or (words[0] in PROGRAMS and len(words) > 1)


def joined(lines: list[str]) -> Iterator[str]:
    """Lines, each with those that continue it after a backslash, without comments and prompts."""
    text = ""
    for line in lines:
        text += line.strip().removeprefix("$ ")
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if text and not text.startswith("#"):
            yield text
        text = ""


FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S[^\n]*\n?)+")


def code_blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of Markdown in one language."""
    return [content for found, content in FENCED.findall(text) if found == language]


def commands_of_markdown(where: str, text: str) -> Iterator[Command]:
    """Every line of a fenced block for a shell, and the commands in indented blocks and in spans of code."""
    for language in SHELLS:
        for content in code_blocks(text, language):
            yield from (Command(where, line) for line in joined(content.splitlines()))
    prose = FENCED.sub("", text)
    for block in INDENTED.findall(prose):
        yield from (Command(where, line) for line in joined(block.splitlines()) if is_command(line))
    for span in re.findall(r"`([^`]+)`", INDENTED.sub("", prose)):
        text = " ".join(span.split())
        if is_command(text):
            yield Command(where, text)


def commands_of_comments(where: str, text: str) -> Iterator[Command]:
    """Commands in the comment that opens a YAML file: lines of their own, indented under the prose."""
    header = re.match(r"(?:#.*\n)*", text)
    lines = [line.removeprefix("#") for line in header[0].splitlines()] if header else []
    yield from (Command(where, line) for line in joined(lines) if is_command(line))


def all_commands() -> list[Command]:
    found: list[Command] = []
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            found += commands_of_markdown(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob(RECIPES)):
        found += commands_of_comments(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    return found
