"""The `Compression` of one view, and the `Strategy` of a step, with one compression for each branch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

BRANCHES = {"online": "", "target": "target_", "local": "local_"}
"""The branches of a strategy, and what stands before the name of a compression's field in a record of the strategy."""


def check_type(name: str, value: Any, kind: type, hint: str = "") -> None:
    """Raise TypeError, which names the argument, unless `value` is of this class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, and not {value!r}{hint}")


@dataclass(frozen=True, order=True)
class Compression:
    """The two ways in which a view's token sequence is shortened.

    Args:
        patch_size: side of a patch in pixels, of a view at the model's image size.
        token_dropout: ratio of patch tokens dropped, in [0, 1); 0 keeps all.

    Example:
        >>> Compression(patch_size=32, token_dropout=0.5).kept_tokens(224)  # of 7 x 7 patches
        24
    """

    patch_size: int
    token_dropout: float = 0.0

    def __post_init__(self):
        if isinstance(self.patch_size, bool) or not isinstance(self.patch_size, int) or self.patch_size < 1:
            raise ValueError(f"patch_size must be a positive whole number of pixels, got {self.patch_size!r}")
        if isinstance(self.token_dropout, bool) or not isinstance(self.token_dropout, int | float):
            raise ValueError(f"token_dropout must be a number in [0, 1), got {self.token_dropout!r}")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"token_dropout must lie in [0, 1), got {self.token_dropout!r}; 0 keeps every token")
        object.__setattr__(self, "token_dropout", float(self.token_dropout))

    def kept_tokens(self, image_size: int) -> int:
        """Count the patch tokens that remain of a square view of `image_size` pixels, without prefix tokens."""
        from ..models.shortening_accel_vit import num_kept_tokens  # it imports torch, and a recipe is checked without

        return num_kept_tokens((image_size // self.patch_size) ** 2, self.token_dropout)

    def to_dict(self, prefix: str = "") -> dict[str, Any]:
        """The fields by name, each name after `prefix`."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], prefix: str = "") -> "Compression":
        """Read the fields from a record, which may hold other keys; a field that it lacks has its default."""
        names = [field.name for field in fields(cls) if prefix + field.name in record]
        return cls(**{name: record[prefix + name] for name in names})

    def abbreviate(self) -> str:
        """As "p8 d0.5": patch size in pixels, token dropout."""
        return f"p{self.patch_size} d{self.token_dropout:g}"

    def __str__(self):
        return f"patch {self.patch_size}, dropout {self.token_dropout:g}"


@dataclass(frozen=True, order=True)
class Strategy:
    """The compressions of a step: of the branch that is trained and of the branch that gives its targets.

    `target` defaults to the paper's choice: the same patch size, and no token dropout. `local` is for the local crops
    of an objective that has them, and None leaves them whole.

    Example:
        >>> Strategy(Compression(32, token_dropout=0.5)).target
        Compression(patch_size=32, token_dropout=0.0)
    """

    online: Compression
    target: Compression | None = None
    local: Compression | None = None

    def __post_init__(self):
        for name in BRANCHES:
            if name == "online" or getattr(self, name) is not None:
                check_type(name, getattr(self, name), Compression)
        if self.target is None:
            object.__setattr__(self, "target", Compression(self.online.patch_size))

    @property
    def target_branch(self) -> Compression:
        """`target`, which `__post_init__` has filled in."""
        assert self.target is not None
        return self.target

    def to_dict(self) -> dict[str, Any]:
        """A flat record of every field of every branch: "patch_size", "target_patch_size" and so on.

        A stage of a schedule, a plan and a table of errors hold it. Local crops that are left whole have no keys.
        """
        record = self.online.to_dict() | self.target_branch.to_dict(BRANCHES["target"])
        return record | (self.local.to_dict(BRANCHES["local"]) if self.local else {})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], base_patch_size: int | None = None) -> "Strategy":
        """Read a record, which may hold other keys; a key that it lacks has its default.

        Patches default to `base_patch_size`, those of the target branch to those of the online branch. Local crops
        are left whole unless a key speaks of them.
        """
        base = {} if base_patch_size is None else {"patch_size": base_patch_size, "local_patch_size": base_patch_size}
        online = Compression.from_dict({**base, **record})
        target = Compression.from_dict({"target_patch_size": online.patch_size, **record}, BRANCHES["target"])
        local = None
        if any(BRANCHES["local"] + field.name in record for field in fields(Compression)):
            local = Compression.from_dict({**base, **record}, BRANCHES["local"])
        return cls(online, target, local)

    @staticmethod
    def keys() -> list[str]:
        """The keys that a record can have."""
        return [prefix + field.name for prefix in BRANCHES.values() for field in fields(Compression)]

    def __str__(self):
        return f"{self.online} | target {self.target}" + (f" | local {self.local}" if self.local else "")


def possible_patch_sizes(image_size: int, base_patch_size: int) -> list[int]:
    """List the possible patch sizes: from the base up, divisors of the image, with a grid of at least 2 x 2."""
    return [p for p in range(base_patch_size, image_size // 2 + 1) if image_size % p == 0]


def check_compression(compression: Compression, image_size: int, base_patch_size: int) -> None:
    """Raise ValueError, which names what is possible, if this model cannot run under `compression`."""
    possible = possible_patch_sizes(image_size, base_patch_size)
    if compression.patch_size not in possible:
        raise ValueError(
            f"patch_size {compression.patch_size} is not possible at image_size {image_size} and base patch "
            f"{base_patch_size}; it must be one of {possible}"
        )
