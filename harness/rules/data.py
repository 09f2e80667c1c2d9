"""DATA: was it this race, on this data, and do the tokens add up?"""

from __future__ import annotations

from harness.rules.reading import Evidence, RunLog, own_track
from harness.rules.rule import Outcome, Rule, count, each_run, failed, passed, unknown, warned


def _track(evidence: Evidence) -> Outcome:
    definition, name = evidence.record.track_definition, evidence.record.track
    if definition.get("id") != name:
        return failed(f"track_definition is of {definition.get('id')!r:.80}", wanted=f"the definition of track {name!r}")
    shipped = evidence.shipped_track
    if shipped is None:
        own_track(definition)
        return warned(
            f"own track {name!r}, as record.json defines it",
            wanted="a track of this program",
            fix="Compare it only with records of the same definition",
        )
    wanted = shipped.definition()
    if definition != wanted:
        key = sorted(
            key for key in {*definition, *wanted} if definition.get(key) != wanted.get(key) or (key in definition) != (key in wanted)
        )[0]
        fix = "Race on the shipped track, or give the own one an id of its own"
        return failed(
            f"track_definition has {key} = {definition.get(key)!r:.100}",
            wanted=f"{wanted.get(key)!r:.100}, as track {name} has it",
            fix=fix,
        )
    return passed(f"track {name} as this program ships it")


def _digests(evidence: Evidence) -> Outcome:
    data, first = evidence.track.data, evidence.runs[0].start["data_sha256"]
    outcome = each_run(evidence, lambda log: _wrong_shard(log, evidence), good=f"{count(len(first), 'shard')}, all pinned by the track")
    if outcome.verdict != "pass":
        return outcome
    for log in evidence.runs:
        if log.start["data_sha256"] != first:
            return failed(f"{log.name} read other data than {evidence.runs[0].name}", wanted="all runs on the same data")
    loose = [name for name in first if name not in data.sha256]
    if loose:
        wanted = "digests to compare with"
        fix = "Compare with the same files by speedrun data check"
        return unknown(
            f"track {evidence.track.id} pins no digest of {len(loose)} of {len(first)} shards; all runs read the same",
            wanted=wanted,
            fix=fix,
        )
    return outcome


def _wrong_shard(log: RunLog, evidence: Evidence) -> tuple[str, str] | None:
    data, digests = evidence.track.data, log.start["data_sha256"]
    for name in data.val_shards:
        if name not in digests:
            return f"no digest of {name}", "one of every validation shard"
    train = [name for name in digests if name not in data.val_shards]
    expected = data.train_shards[: len(train)]
    if not train or sorted(train) != sorted(expected):
        return f"training shards {', '.join(sorted(train))[:100] or 'none'}", "the track's first training shards, none left out"
    for name, digest in digests.items():
        if digest != data.sha256.get(name, digest):
            return f"{name} has sha256 {digest!s:.16}", f"{data.sha256[name]:.16}, as the track pins it"
    return None


def _tokens(evidence: Evidence) -> Outcome:
    batch = evidence.record.recipe.get("batch_tokens")
    fixed = evidence.track.batch_tokens
    problem = each_run(evidence, _not_rising, good="")
    if problem.verdict != "pass":
        return problem
    if fixed is not None and batch != fixed:
        return failed(f"recipe has batch_tokens = {batch!r:.80}", wanted=f"{fixed}, which track {evidence.track.id} fixes")
    if type(batch) is not int or batch <= 0:
        return unknown(
            "recipe has no batch_tokens; the tokens rise with every step",
            wanted="steps x batch_tokens",
            fix="Give the recipe a batch_tokens",
        )
    outcome = each_run(evidence, lambda log: _off(log, batch), good=f"the tokens of every step are the sum of its batches of {batch}")
    if outcome.verdict == "fail" and fixed is None and evidence.record.frozen == "modified":
        return warned(outcome.found, wanted=outcome.wanted, fix="Right for a trainer that changes its batch while it runs: read its source")
    return outcome


def _not_rising(log: RunLog) -> tuple[str, str] | None:
    """Every step takes tokens, and no event has fewer than the one before."""
    before, stepped = 0, 0
    for number, event in enumerate(log.events, start=1):
        kind = event["event"]
        if kind not in ("step", "validation", "finish"):
            continue
        if event["tokens"] < before or (kind == "step" and event["tokens"] <= stepped):
            return f"line {number}: {event['tokens']} tokens after {before}", "more with every step"
        before = event["tokens"]
        stepped = before if kind == "step" else stepped
    return None


def _off(log: RunLog, batch: int) -> tuple[str, str] | None:
    """Tokens are step x batch; a loop that draws the next batch early is one batch ahead."""
    for number, event in enumerate(log.events, start=1):
        if event["event"] in ("step", "validation", "finish") and event["tokens"] - event["step"] * batch not in (0, batch):
            return (
                f"line {number}: {event['tokens']} tokens at step {event['step']}",
                f"{event['step'] * batch}, or one batch of {batch} drawn ahead",
            )
    return None


def _epochs(evidence: Evidence) -> Outcome:
    seen: dict[int, tuple[float, str]] = {}
    for log in evidence.runs:
        finish = log.finish
        epochs, name = seen.setdefault(finish["tokens"], (finish["epochs"], log.name))
        if epochs != finish["epochs"]:
            return failed(
                f"{log.name} has {finish['epochs']} epochs, {name} {epochs}", wanted="the same for the same tokens of the same data"
            )
    most = max(epochs for epochs, _ in seen.values())
    return passed(f"{most:g} epochs of the training data")


RULES = (
    Rule(
        id="DATA-1",
        sentence="The track is the one that this program ships under its id.",
        false_alarms="A record from before a track was changed: verify it with the release it was made with.",
        check=_track,
    ),
    Rule(
        id="DATA-2",
        sentence="Every run read the track's shards, each with the digest that the track pins.",
        false_alarms="None known where digests are pinned; where they are not, the verdict is unknown.",
        check=_digests,
    ),
    Rule(
        id="DATA-3",
        sentence="The tokens of every step are the sum of the batches so far.",
        false_alarms="A modified trainer that changes its batch size while it runs: only warned about, unless the track fixes the batch.",
        check=_tokens,
    ),
    Rule(
        id="DATA-4",
        sentence="Runs of as many tokens went through the training data as often.",
        false_alarms="None known: both follow from the same shards.",
        check=_epochs,
    ),
)
