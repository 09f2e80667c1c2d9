"""SOURCE: is the source that is shown the source that ran, and is it the frozen trainer?"""

from __future__ import annotations

from data.errors import UserError
from harness.rules.reading import Evidence
from harness.rules.rule import Outcome, Rule, count, each_run, failed, passed, unknown
from harness.source import frozen_version, source_digest, source_files


def _digest(evidence: Evidence) -> Outcome:
    wanted = evidence.record.source_sha256
    folder = evidence.folder / "source"
    odd = [
        f"{name} is a {kind}"
        for name, kind in evidence.files.items()
        if kind != "file" and (name == "source" or name.startswith("source/"))
    ]
    if odd:  # asked first, since hashing opens every file
        return failed(odd[0], wanted="a folder of plain files")
    try:
        covered = {path.relative_to(evidence.folder).as_posix() for path in source_files(folder)}
        found = source_digest(folder)
    except (UserError, OSError) as error:
        return failed(f"source/: {getattr(error, 'what', error)}", wanted="the trainer exactly as it ran")
    hidden = [name for name in evidence.files if name.startswith("source/") and name not in covered]
    if hidden:
        return failed(f"{hidden[0]} is not covered by the source digest", wanted="nothing in source/ but what is hashed and run")
    if found != wanted:
        return failed(f"source/ has digest {found:.16}", wanted=f"{wanted:.16}, as record.json")
    good = f"{count(len(covered), 'file')}, digest {found:.16}, as every run's start says"
    return each_run(evidence, lambda log: _other(log.start["source_sha256"], wanted), good=good)


def _other(found: str, wanted: str) -> tuple[str, str] | None:
    return None if found == wanted else (f"ran source {found:.16}", f"{wanted:.16}, as record.json")


def _frozen(evidence: Evidence) -> Outcome:
    stated = evidence.record.frozen
    try:
        actual = frozen_version(evidence.record.source_sha256)
    except OSError as error:
        return unknown(
            f"the list of frozen trainers cannot be read: {error}", wanted="trainer/FROZEN of this program", fix="Install the program again"
        )
    if stated != actual:
        fix = "Verify with the release that has this frozen version, if there is one"
        return failed(f"record.json says {stated!r:.80}", wanted=f"{actual!r}, by the source digest", fix=fix)
    for log in evidence.runs:
        if log.start["frozen"] != actual:
            return failed(f"{log.name} says {log.start['frozen']!r:.80}", wanted=f"{actual!r}, by the source digest")
    return passed("modified: not the frozen trainer, and it says so" if actual == "modified" else f"frozen trainer {actual}")


RULES = (
    Rule(
        id="SOURCE-1",
        sentence="source/ is what every run hashed before it started, and holds nothing else.",
        false_alarms="Caches or hidden files that an editor left in source/: remove them. Line endings changed on checkout: check out unchanged.",
        check=_digest,
    ),
    Rule(
        id="SOURCE-2",
        sentence="The record says truly whether it ran a frozen trainer, and which.",
        false_alarms="A frozen version newer than this program: verify with the newer release.",
        check=_frozen,
    ),
)
