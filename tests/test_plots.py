"""Figures and their numbers: what is drawn is what the events say, twice the same, and never two tracks at once."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from data.errors import UserError
from harness.cli_plot import plot
from harness.events import read_events
from harness.record import read_record
from plots.figure1 import figure1, tokens_text
from plots.frame import summaries, validations
from plots.style import save
from plots.time import time
from tests.records import make_record, write_events

ROOT = Path(__file__).parent.parent
GRID = (0, 20, 40, 60, 80, 100)  # validated steps of a pocket run of 100


@pytest.fixture
def records(tmp_path):
    return tmp_path / "records"


@pytest.fixture
def muon(records):
    return make_record(records)


@pytest.fixture
def adamw(records):
    return make_record(records, name="adamw", recipe_name="adamw", seeds=(7,), final_losses=(1.95,), ms_per_step=740.0)


def drawn(figure, record):
    """(x, y) of a record's line."""
    lines = [line for line in figure.axes[0].lines if line.get_label() == record]
    assert len(lines) == 1
    return lines[0].get_xdata(), lines[0].get_ydata()


def events_of(folder, seed, kind="validation"):
    return [event for event in read_events(folder / "runs" / f"{seed}.jsonl") if event["event"] == kind]


def words(figure):
    """Everything written in the legend, the title and the footer."""
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()], figure.get_suptitle(), figure.get_supxlabel()


def rewrite(folder, seed, change):
    """Pass every event of a run through `change`; the chain is made anew."""
    path = folder / "runs" / f"{seed}.jsonl"
    events = [changed for event in read_events(path) for changed in change(event)]
    path.unlink()
    write_events(path, events)


# ---- tables ----


def test_frame_has_one_row_per_validation(muon, adamw):
    """Each validation event of each run is one row, with the event's own numbers."""
    frame = validations([muon, adamw])
    events = [event for folder, seeds in ((muon, (1, 2, 3, 4)), (adamw, (7,))) for seed in seeds for event in events_of(folder, seed)]

    assert 5 * len(GRID) == len(frame)
    for column in ("step", "tokens", "val_loss", "train_time_ms"):
        assert [event[column] for event in events] == list(frame[column])
    assert list(frame["seed"]) == [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6 + [7] * 6


def test_summary_is_the_claim(muon):
    """A record's row says what its claim says, and time over steps."""
    row, record = summaries([muon]).iloc[0], read_record(muon)

    for key, value in record.claim.model_dump().items():
        assert value == row[key]
    assert round(record.claim.mean_train_time_ms / 100, 3) == row["step_avg_ms"]
    assert (muon.name, "pocket", record.rules_version) == (row["record"], row["track"], row["rules_version"])


def test_single_run_has_no_spread_and_no_p_value(adamw):
    """What one run cannot say stays empty."""
    row = summaries([adamw]).iloc[0]

    assert pd.isna(row["sd_val_loss"])
    assert pd.isna(row["p_value"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda event: [] if event["event"] == "finish" else [event], "has not finished"),
        (lambda event: [] if event["event"] == "validation" else [event], "last validation is missing"),
        (
            lambda event: [event | {"val_loss": 1.5}] if event["event"] == "finish" else [event],
            "val_loss is 1.5 in the event file and 1.781",
        ),
        (lambda event: [event | {"val_loss": 1.5}] if event["event"] == "validation" else [event], "not that of the finish"),
        (lambda event: [event | {"val_loss": "low"}] if event["event"] == "validation" else [event], "val_loss of a validation is 'low'"),
        (lambda event: [event | {"val_loss": "low"}] if event["event"] == "finish" else [event], "a value has the wrong type"),
        (lambda event: [{"event": "finish"}] if event["event"] == "finish" else [event], "start or finish lacks a value"),
        (lambda event: [], "it is empty"),
    ],
)
def test_broken_event_file_is_refused(muon, damage, message):
    """A run whose events do not bear out the record is not plotted; the error names the file."""
    rewrite(muon, 1, damage)

    with pytest.raises(UserError, match=message) as caught:
        validations([muon])
    assert str(muon / "runs" / "1.jsonl") in caught.value.where


def test_track_without_target_is_refused(records):
    """A figure without its target line would say nothing."""
    folder = make_record(records, seeds=(1,), final_losses=(1.9,), track_definition={"target_loss": "low"})

    with pytest.raises(UserError, match="target_loss is 'low', not a number"):
        summaries([folder])


def test_a_record_given_twice_is_refused(muon):
    """Folder names tell records apart, so each stands once."""
    with pytest.raises(UserError, match=f"two records have the folder name {muon.name}"):
        validations([muon, muon / "."])


# ---- figures ----


def test_every_marker_of_a_single_run_is_an_event(adamw):
    """With one run the line is the run: same tokens, same losses, same times."""
    frame, summary = validations([adamw]), summaries([adamw])
    events = events_of(adamw, 7)

    x, y = drawn(figure1(frame, summary), adamw.name)
    assert [event["tokens"] for event in events] == list(x)
    assert [event["val_loss"] for event in events] == list(y)

    x, y = drawn(time(frame, summary), adamw.name)
    assert [event["train_time_ms"] / 1e3 for event in events] == list(x)
    assert [event["val_loss"] for event in events] == list(y)


def test_line_is_the_mean_and_band_the_range_of_the_runs(muon):
    """Over several runs a marker is their mean loss and mean time, and the band goes from the lowest to the highest."""
    frame, summary = validations([muon]), summaries([muon])
    losses = np.array([[event["val_loss"] for event in events_of(muon, seed)] for seed in (1, 2, 3, 4)])
    times = np.array([[event["train_time_ms"] for event in events_of(muon, seed)] for seed in (1, 2, 3, 4)])
    figure = time(frame, summary)
    x, y = drawn(figure, muon.name)
    (band,) = figure.axes[0].collections
    edge = band.get_paths()[0].vertices

    assert losses.mean(axis=0) == pytest.approx(y)
    assert times.mean(axis=0) / 1e3 == pytest.approx(x)
    for column, at in enumerate(x):
        heights = edge[np.isclose(edge[:, 0], at), 1]
        assert (losses[:, column].min(), losses[:, column].max()) == pytest.approx((heights.min(), heights.max()))


def test_single_run_has_no_band(adamw):
    """One run has no range."""
    assert not figure1(validations([adamw]), summaries([adamw])).axes[0].collections


@pytest.mark.parametrize(("track", "target", "text"), [("pocket", 1.82, "target\n1.82"), ("fineweb", 3.28, "target\n3.28")])
def test_target_line_lies_at_the_target(records, track, target, text):
    """The dashed line is the track's target and is labelled with it."""
    folder = make_record(records, track=track, seeds=(1,), final_losses=(target - 0.01,))
    axes = figure1(validations([folder]), summaries([folder])).axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "target"]

    assert [target, target] == list(line.get_ydata())
    assert line.get_linestyle() == "--"
    assert [text] == [note.get_text() for note in axes.texts]


def test_loss_axis_leaves_out_the_steep_part(muon, adamw):
    """The axis begins just below the lowest final loss, keeps every record's later part, and cuts off its first steps."""
    frame = validations([muon, adamw])
    low, high = figure1(frame, summaries([muon, adamw])).axes[0].get_ylim()
    late = frame[frame["step"] >= 40]["val_loss"]

    assert frame["val_loss"].min() == 1.779
    assert 1.74 < low < 1.779
    assert late.max() < high < 2.2
    assert frame[frame["step"] == 20]["val_loss"].min() > high - 0.1
    assert frame[frame["step"] == 0]["val_loss"].min() > high + 3


def test_target_far_below_is_still_in_sight(records):
    """A record that misses the target by far is drawn with the target."""
    folder = make_record(records, seeds=(1,), final_losses=(2.9,))
    low, high = figure1(validations([folder]), summaries([folder])).axes[0].get_ylim()

    assert low < 1.82
    assert high > 2.9


def test_legend_gives_name_tokens_pace_and_runs_in_columns(muon, adamw):
    """All rows of the legend are equally long, so that columns stand under each other."""
    rows, title, footer = words(figure1(validations([muon, adamw]), summaries([muon, adamw])))

    assert [row.split() for row in rows] == [
        ["record", "trained", "on", "ms/step", "n"],
        ["muon", "0.82M", "tokens", "802", "4"],
        ["adamw", "0.82M", "tokens", "745", "1"],
    ]
    assert len({len(row) for row in rows}) == 1
    assert title == "Shakespeare on a laptop: validation loss against training tokens"
    assert f"Records: {muon.name}, {adamw.name}.\nRules 1.0.\n" in footer


def test_awkward_names_are_drawn_as_they_are(records):
    """A name is text: no formulas, no hidden labels, no glyphs that the font lacks, no row wider than the figure; twins go by folder."""
    folders = [
        make_record(records, name=name, seeds=(1,), final_losses=(1.9,), steps=20)
        for name in ("_$\\no formula$", "speed \N{CJK UNIFIED IDEOGRAPH-65E5}\nrun " * 10, "a b", "a-b c")
    ]
    summary = summaries(folders)
    summary.loc[2:, "name"] = "twin"
    figure = figure1(validations(folders), summary)
    rows, _, _ = words(figure)
    figure.draw_without_rendering()

    assert rows[1].startswith(" _$\\no formula$ ")
    assert rows[2].startswith(" speed \N{REPLACEMENT CHARACTER} run speed")
    assert "…" in rows[2]
    assert [folders[2].name, folders[3].name] == [row.split()[0] for row in rows[3:]]
    assert figure.axes[0].get_legend().get_window_extent().x1 < figure.bbox.x1


def test_nothing_overlaps_with_many_records(records):
    """With twelve records the figure grows: title, legend, axes and footer keep apart and inside it."""
    folders = [
        make_record(records, name=f"entry {k}", seeds=(1,), final_losses=(1.9,), steps=20, division=f"cpu {k} threads Test Processor")
        for k in range(12)
    ]
    figure = time(validations(folders), summaries(folders))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [
        artist.get_window_extent() for artist in (figure._supxlabel, axes.xaxis.label, axes.patch, axes.get_legend(), figure._suptitle)
    ]
    edges = [0, *(edge for box in boxes for edge in (box.y0, box.y1)), figure.bbox.y1]

    assert sorted(edges) == edges
    assert axes.get_window_extent().height > 3 * figure.dpi


def test_divisions_are_named_when_they_differ(records, muon):
    """Records of two machine classes may be drawn together; the footer says that their times do not compare."""
    gpu = make_record(records, name="gpu", seeds=(1,), final_losses=(1.89,), division="1x NVIDIA H200")
    _, _, footer = words(time(validations([muon, gpu]), summaries([muon, gpu])))
    _, _, alone = words(time(validations([muon]), summaries([muon])))

    assert "The divisions differ, so times and ms/step do not compare." in footer
    assert f"1x NVIDIA H200: {gpu.name}." in footer
    assert "Division: cpu 2 threads Test Processor." in alone
    assert "differ" not in alone


@pytest.mark.parametrize("draw", [figure1, time])
def test_mixed_tracks_are_refused(records, adamw, draw):
    """Losses of different data cannot stand in one figure."""
    other = make_record(records, track="fineweb", seeds=(1,), final_losses=(3.27,))

    with pytest.raises(UserError, match="different tracks: pocket, fineweb"):
        draw(validations([adamw, other]), summaries([adamw, other]))


def test_runs_validated_at_different_steps_are_refused(muon):
    """A mean over some of the runs would look like a mean over all."""
    rewrite(muon, 2, lambda event: [] if event["event"] == "validation" and event["step"] == 40 else [event])

    with pytest.raises(UserError, match="only some runs validated at step 40"):
        figure1(validations([muon]), summaries([muon]))


def test_a_step_validated_twice_counts_as_the_last_time(adamw):
    """The finish validates once more; what is drawn is what the record claims."""
    rewrite(
        adamw, 7, lambda event: [event | {"val_loss": 2.0}, event] if event["event"] == "validation" and event["step"] == 100 else [event]
    )
    frame = validations([adamw])
    x, y = drawn(figure1(frame, summaries([adamw])), adamw.name)

    assert len(GRID) + 1 == len(frame)
    assert len(GRID) == len(x)
    assert y[-1] == 1.95


@pytest.mark.parametrize(
    ("tokens", "text"), [(819_200, "0.82M"), (2_673_868_800, "2.67B"), (524_288_000, "524M"), (16_384, "16.4k"), (999_600_000, "1.00B")]
)
def test_tokens_are_told_in_three_digits(tokens, text):
    """Token counts read as the field says them."""
    assert text == tokens_text(tokens)


@pytest.mark.parametrize(
    ("ms_per_step", "label", "end"), [(800.0, "seconds", "80.1 s"), (31_000.0, "minutes", "51.7 min"), (360_000.0, "hours", "10.0 h")]
)
def test_time_is_in_the_unit_that_fits(records, ms_per_step, label, end):
    """Pocket in seconds, the speedrun in minutes, a long race in hours; the legend uses the axis's unit."""
    folder = make_record(records, seeds=(1,), final_losses=(1.9,), ms_per_step=ms_per_step)
    figure = time(validations([folder]), summaries([folder]))
    rows, _, _ = words(figure)

    assert f"training time ({label})" == figure.axes[0].get_xlabel()
    assert f" {end} " in rows[1]


def test_tokens_axis_has_units(records):
    """Ticks read 0.5B or 0.2M, not 1e9."""
    folder = make_record(records, track="fineweb", seeds=(1,), final_losses=(3.27,), batch_tokens=2**24)
    figure = figure1(validations([folder]), summaries([folder]))
    figure.draw_without_rendering()
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]

    assert ticks[0] == "0"
    assert "1B" in ticks


def test_figures_are_the_same_bytes_each_time(muon, adamw, tmp_path, monkeypatch):
    """Drawn twice, at different times and with other defaults of the user, PNG and SVG do not differ, and carry no date."""
    import matplotlib

    files = []
    for name, size in (("a", 10), ("b", 25)):
        monkeypatch.setitem(matplotlib.rcParams, "font.size", size)
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(size))
        files.append(save(figure1(validations([muon, adamw]), summaries([muon, adamw])), tmp_path / name))

    assert [tmp_path / "a.png", tmp_path / "a.svg"] == files[0]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in files[0][1].read_bytes()
    assert sorted(["a.png", "a.svg", "b.png", "b.svg", "records"]) == sorted(path.name for path in tmp_path.iterdir())


# ---- command line ----


def run(*arguments):
    return CliRunner().invoke(plot, [str(argument) for argument in arguments])


def test_command_draws_the_track_of_this_folder_by_default(muon, adamw, records, tmp_path, monkeypatch):
    """Without arguments, figure1 takes every pocket record and writes figure1-pocket here."""
    make_record(records, track="fineweb", seeds=(1,), final_losses=(3.27,))
    monkeypatch.chdir(tmp_path)
    result = run("figure1")

    assert (result.exit_code, result.stdout) == (0, "figure1-pocket.png\nfigure1-pocket.svg\n")
    assert Path("figure1-pocket.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in Path("figure1-pocket.svg").read_text()


def test_csv_is_the_frame(muon, adamw, tmp_path):
    """--csv writes the table of the figure, to the last digit; with - it alone is on stdout."""
    result = run("figure1", muon, adamw, "--out", tmp_path / "f.png", "--csv", "-")
    frame, table = validations([muon, adamw]), pd.read_csv(io.StringIO(result.stdout), dtype=str)

    assert result.exit_code == 0
    pd.testing.assert_frame_equal(frame, table.astype(frame.dtypes), check_exact=True)
    assert f"{tmp_path / 'f.png'}\n{tmp_path / 'f.svg'}\n" == result.stderr


def test_json_names_files_and_numbers(muon, adamw, tmp_path, monkeypatch):
    """--json prints the files and what each record claims; the unknown is null. --track picks among records of several tracks."""
    other = make_record(muon.parent.parent, track="fineweb", seeds=(1,), final_losses=(3.27,))
    monkeypatch.chdir(tmp_path)
    result = run("time", other, adamw, muon, "--track", "pocket", "--csv", "t.csv", "--json")
    printed = json.loads(result.stdout)

    assert printed["files"] == ["time-pocket.png", "time-pocket.svg", "t.csv"]
    assert [("adamw", 1, None), ("muon", 4, read_record(muon).claim.p_value)] == [
        (row["name"], row["n"], row["p_value"]) for row in printed["records"]
    ]
    assert Path("t.csv").read_text() == validations([adamw, muon]).to_csv(index=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure1", "nowhere"], "no record here or below"),
        (["figure1", "--track", "poket"], "there is no track 'poket'"),
        (["figure1", "--track", "fineweb-medium"], "there are no records of track fineweb-medium yet"),
        (["time", "records", "--track", "fineweb"], "none of the records given is of track fineweb"),
        (["figure1", "records", "--out", "nowhere/f"], "cannot be written: No such file or directory"),
        (["figure1", "records", "--out", "f", "--csv", "nowhere/f.csv"], "cannot be written: No such file or directory"),
    ],
)
def test_mistakes_say_what_where_and_what_to_do(adamw, tmp_path, monkeypatch, arguments, message):
    """Each mistake raises a UserError, which the top level prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.home.repository", lambda: tmp_path)
    error = run(*arguments).exception

    assert isinstance(error, UserError)
    assert message in error.what
    assert error.where
    assert error.fix


@pytest.mark.parametrize(("arguments", "message"), [(["--csv", "-", "--json"], "both want stdout"), (["--out", ".."], "has no file name")])
def test_wrong_usage_exits_with_2(adamw, tmp_path, monkeypatch, arguments, message):
    """What cannot be meant is wrong usage."""
    monkeypatch.chdir(tmp_path)
    result = run("figure1", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr


def test_help_imports_nothing_heavy():
    """`plot --help` stays instant: no torch, numpy, pandas, scipy or matplotlib."""
    code = (
        "import sys; from harness.cli_plot import plot\n"
        "try: plot(['figure1', '--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'pandas', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "speedrun plot figure1 --track fineweb" in done.stdout
    assert done.stdout.endswith("\n[]\n")


def test_plots_import_no_torch():
    """Drawing does not wait for torch, which takes seconds to import."""
    code = "import sys, plots.figure1, plots.frame, plots.style, plots.time; print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"
