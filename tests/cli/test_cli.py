"""The command line as a user meets it; in this process through `main(argv)`, by subprocess where a process matters."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit import commands
from factorkit.cli import COMMANDS, main
from factorkit.data import flowers, procedural_dataset
from factorkit.engine.log import read_log
from factorkit.metrics.baselines import BASELINES, all_foreground
from factorkit.segdiff.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "resolution": 16, "regions": 2, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (), "groups": 4,
    "steps": 4, "batch_size": 4, "log_every": 1, "sample_every": 0,
}  # fmt: skip


def flags(**changes) -> list[str]:
    """A tiny training as flags, over the preset demo."""
    values = {key: value for key, value in (SMALL | changes).items() if value != ()}
    words = ["train", "segdiff", "--preset", "demo"]
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread is enough for 16 pixels, nobody looks at the report's curves, GrabCut takes half a second an image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factorkit.engine.report.draw_curves", lambda log, theme: [])
        patch.setitem(BASELINES, "grabcut", all_foreground)
        patch.setenv("OMP_NUM_THREADS", "1")  # of subprocesses
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, or a run in the working folder."""
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def ask(capsys):
    """ask(*words): exit code, standard output, standard error."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def answer(ask):
    """answer(*words): the JSON object, which has to be the only line on standard output."""

    def run(*words) -> dict:
        code, out, err = ask(*words, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.fixture
def refused(ask):
    """refused(*words): the message of a user's mistake, which has to be the same in words and in JSON."""

    def run(*words) -> str:
        code, out, err = ask(*words, "--json")
        assert code == 2 and "Traceback" not in err
        message = json.loads(out)["error"]
        assert f"error: {message}" in err
        return message

    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A data set of 24 drawn flowers with masks."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for kind, pictures in zip(("images", "masks"), flowers(24, 20, seed=1), strict=True):
        (folder / kind).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / kind / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    """A run trained on them for 4 steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTORKIT_CACHE", str(folder.parent / "cache"))
        assert main([*flags(), "--data", str(photos), "--out", str(folder)]) == 0
    return folder


# --- help and mistakes ---


def test_help_and_mistakes_are_answered_without_torch():
    script = """if True:
        import sys
        from factorkit.cli import main
        assert main(["--help"]) == main(["segment", "--help"]) == main([]) == 0
        assert main(["segment", "run", "--out", "x"]) == main(["generate", "run"]) == main(["sgement"]) == 2
        assert not {"torch", "matplotlib", "numpy"} & set(sys.modules), "something heavy was imported"
    """
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for name in COMMANDS:
        assert f"\n    {name} " in said.stdout
    assert "NAME_overlay.png" in said.stdout and "RUN PATHS..." in said.stdout


def test_an_unknown_command_names_its_neighbours(refused):
    assert "Did you mean segment" in refused("segmnt", "x")
    assert "train" in refused("nonsense")


def test_unknown_flags_list_near_matches(refused):
    message = refused("train", "segdiff", "--batchsize", 3)
    assert "Unrecognized options: --batchsize, 3\n" in message and " --batch-size INT\n" in message
    assert not set("│╭╰─\x1b") & set(message) and "---" not in message, "the frame is left"


def test_other_models_are_refused(refused):
    for command in ("train", "demo"):
        message = refused(command, "nerfdiff")
        assert "nerfdiff" in message and "segdiff" in message


def test_a_preset_sets_the_defaults_that_help_shows(ask, refused):
    code, thesis, _ = ask("train", "segdiff", "--preset=flowers64", "--help")
    _, own_data, _ = ask("train", "segdiff", "--data", "photos", "--help")
    assert code == 0 and "(default: thesis)" in thesis and "(default: 50000)" in thesis
    assert "(default: 64)" in own_data and "(default: regional)" in own_data  # fast64
    assert "flowers128" in refused("train", "segdiff", "--preset", "flowers99")


def test_a_mistake_shows_a_traceback_only_on_request(ask, monkeypatch, tmp_path):
    mistake = ("segment", tmp_path / "nowhere", "x.jpg", "--out", tmp_path / "out")
    assert "Traceback" not in ask(*mistake)[2]
    assert "Traceback" in ask(*mistake, "--debug")[2]
    monkeypatch.setenv("FACTORKIT_DEBUG", "1")
    code, _, err = ask(*mistake)
    assert code == 2 and "Traceback" in err and "nowhere" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "runs/x"), 1, ("runs/x", "Free some space")),
        (PermissionError(13, "Permission denied", "/root/x"), 2, ("/root/x", "permissions")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried much."), 1, ("--micro-batch-size", "CUDA out of memory")),
        (KeyboardInterrupt(), 130, ("interrupted",)),
    ],
)
def test_failures_of_the_machine_get_words_and_codes(ask, monkeypatch, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(commands, "generate", fail)
    found, out, err = ask("generate", "run", "--out", "x", "--json")
    assert found == code and "Traceback" not in err
    assert all(word in err and word in json.loads(out)["error"] for word in words)


def test_a_bug_keeps_its_traceback(ask, monkeypatch):
    monkeypatch.setattr(commands, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask("generate", "run", "--out", "x")


def test_only_the_result_reaches_standard_output(ask, monkeypatch):
    def chatty(*args, **kwargs):
        print("a library's remark")
        warnings.warn("one image is broken", stacklevel=2)
        return {"answer": 42}, "the answer is 42"

    monkeypatch.setattr(commands, "generate", chatty)
    words = ("generate", "run", "--out", "x")
    for flag, out in ((), "the answer is 42\n"), (("--json",), '{"answer": 42}\n'):
        code, said, noted = ask(*words, *flag)
        assert code == 0 and said == out
        assert noted == "a library's remark\nwarning: one image is broken\n"


# --- train ---


def test_training_leaves_a_run_with_scores(run, photos, answer, ask):
    settings = json.loads((run / "config.json").read_text())
    assert settings["steps"] == 4 and settings["multipliers"] == [1, 2] and settings["preset"] == "demo"
    assert settings["prediction"] == "v", "what no flag gave is left to the form"
    again = answer(*flags(), "--data", photos, "--out", run)
    assert [event["event"] for event in read_log(run)].count("start") == 1, "the same command resumes"
    assert again["scores"]["iou"] == json.loads((run / "scores.json").read_text())["iou"]
    assert Path(again["report"]).is_file() and Path(again["run"]) == run
    code, out, err = ask(*flags(), "--data", photos, "--out", run)
    assert code == 0 and f"{again['scores']['iou']:.3f}" in out and str(run / "report.html") in out


def test_settings_that_cannot_work_are_refused(run, photos, refused):
    assert "width" in refused(*flags(width=16), "--data", photos, "--out", run)
    assert "regions=0" in refused(*flags(regions=0), "--out", "new")
    assert "resolution=17" in refused(*flags(resolution=17), "--out", "new")
    assert "nowhere" in refused(*flags(), "--data", "nowhere", "--out", "new")
    assert not Path("new").exists()


def test_holdout_takes_a_number_or_a_word(photos, answer):
    dry = (*flags(steps=1), "--data", photos, "--dry-run")
    assert answer(*dry, "--holdout", 7)["held_out"] == 7
    assert answer(*dry, "--holdout", "none")["images"] == 24


def test_dry_run_estimates_and_writes_nothing(ask, answer):
    found = answer(*flags(), "--dry-run", "--out", "new")
    assert found["parameters"] > 1000 and found["images_per_second"] > 0
    assert found["seconds"] == pytest.approx(4 * 4 / found["images_per_second"])
    assert "images/s" in ask(*flags(), "--dry-run")[1]
    assert not list(Path().iterdir())


def test_sigterm_saves_and_the_same_command_resumes(tmp_path, ask):
    out = tmp_path / "run"
    np.save(tmp_path / "data.npy", flowers(8, 16)[0])
    words = [*flags(steps=100_000), "--data", str(tmp_path / "data.npy"), "--out", str(out)]
    command = [sys.executable, "-m", "factorkit", *words, "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(event["event"] == "step" for event in read_log(out)) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, noted = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "the same command goes on" in json.loads(said)["error"] and "Traceback" not in noted
    reached = max(event["step"] for event in read_log(out) if event["event"] == "step")
    assert ask(*words, "--steps", reached + 1)[0] == 0
    assert [event["step"] for event in read_log(out) if event["event"] == "step"] == list(range(1, reached + 2))


def test_ctrl_c_says_what_is_saved(ask, run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train_segdiff", interrupted)
    code, _, err = ask(*flags(), "--out", run)
    assert code == 130 and str(run) in err and "checkpoint is saved" in err
    code, _, err = ask(*flags(), "--out", "new")
    assert code == 130 and "nothing was saved" in err


# --- segment ---


def test_segment_writes_every_picture_at_its_own_size(run, answer, tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    rng = np.random.default_rng(0)
    sizes = {"a/x.png": (30, 20), "b/x.png": (18, 40), "ünï.bmp": (16, 16), "x.jpg": (22, 22), "x.png": (9, 33)}
    for name, size in sizes.items():
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(inputs / name)
    (inputs / "broken.jpg").write_bytes((inputs / "x.jpg").read_bytes()[:300])

    found = answer("segment", run, inputs, "--out", out, "-t", 10)
    assert found["segmented"] == 5 and list(found["skipped"]) == ["broken.jpg"]
    assert sum(found["areas"]) == pytest.approx(1)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    names = ("a/x", "b/x", "ünï", "x", "x.png")  # the second of two equal stems keeps its suffix
    endings = ("labels", "mask_0", "mask_1", "overlay")
    assert written == {f"{name}_{ending}.png" for name in names for ending in endings} | {"contact_sheet.png"}

    labels, masks = Image.open(out / "a/x_labels.png"), [Image.open(out / f"a/x_mask_{k}.png") for k in (0, 1)]
    assert labels.mode == "P" and labels.size == masks[0].size == (30, 20)
    first, second = (np.asarray(mask).astype(int) for mask in masks)
    assert np.abs(first + second - 255).max() <= 1
    clear = np.abs(first - second) > 2
    assert (np.asarray(labels)[clear] == (second > first)[clear]).all()
    assert Image.open(out / "x.png_overlay.png").size == (9, 33)


def test_results_are_no_input_for_the_next_call(run, answer, refused, photos, tmp_path):
    picture = tmp_path / "photo.png"
    picture.write_bytes((photos / "images/00.png").read_bytes())
    for _ in range(2):
        assert answer("segment", run, tmp_path, "--out", tmp_path)["segmented"] == 1
    picture.unlink()
    assert "results of an earlier call" in refused("segment", run, tmp_path, "--out", tmp_path)


def test_names_stay_apart_and_below_the_output_folder():
    names = commands.output_names(["x.jpg", "x.png", "X.tif", "x.jpg.png", "../../up.png", "/etc/root.png", "x.jpg"])
    assert len({name.casefold() for name in names}) == 7
    assert names[:2] == ["x", "x.png"] and names[4:6] == ["up", "etc/root"]


def test_pictures_in_a_zip_and_equal_files_given_twice(run, photos, answer, tmp_path):
    pictures = sorted((photos / "images").iterdir())[:2]
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for picture in pictures:
            archive.write(picture, f"deep/{picture.name}")
    assert answer("segment", run, tmp_path / "pictures.zip", "--out", tmp_path / "a")["segmented"] == 2
    assert (tmp_path / "a/deep/00_labels.png").is_file()
    answer("segment", run, pictures[0], pictures[0], "--out", tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*_labels.png"))) == 2


def test_the_contact_sheet_shows_the_first_and_memory_stays_flat(run, photos, answer, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "SHEET_IMAGES", 2)
    answer("segment", run, photos / "images", "--out", tmp_path)
    height = Image.open(tmp_path / "contact_sheet.png").height
    assert 2 * 120 <= height < 3 * 120


def test_what_cannot_be_segmented_is_refused(run, refused, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    out = ("--out", tmp_path / "out")
    assert "broken.png" in refused("segment", run, broken, *out)
    assert "nothing.jpg" in refused("segment", run, tmp_path / "nothing.jpg", *out)
    assert "t=1000" in refused("segment", run, run / "samples", *out, "-t", 1000)
    assert "PATHS" in refused("segment", run, *out)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"0" * 100)
    assert "foreign" in refused("segment", foreign, broken, *out)


# --- generate, evaluate, prepare, demo, doctor ---


def test_generate_writes_images_and_what_they_are_made_of(run, answer, refused, tmp_path):
    drawn = ("generate", run, "-n", 3, "--steps", 2, "--seed", 5)
    found = answer(*drawn, "--out", tmp_path / "a", "--trajectory")
    assert found["generated"] == 3 and Path(found["trajectory"]).is_file() and Path(found["contact_sheet"]).is_file()
    names = {path.name for path in (tmp_path / "a").glob("generated_*")}
    assert names == {f"generated_000{i}{end}.png" for i in range(3) for end in ("", "_labels", "_mask_0", "_mask_1")}
    answer(*drawn, "--out", tmp_path / "b")
    answer(*drawn[:-1], 6, "--out", tmp_path / "c")
    first, same, other = (np.asarray(Image.open(tmp_path / c / "generated_0002.png")) for c in "abc")
    assert first.shape == (16, 16, 3) and (first == same).all() and (first != other).any()
    assert "n=0" in refused("generate", run, "-n", 0, "--out", tmp_path)


def test_a_plain_ddpm_generates_and_refuses_to_segment(photos, answer, refused, tmp_path):
    assert "scores" in answer(*flags(regions=1, steps=1), "--data", photos, "--out", tmp_path / "plain")
    answer("generate", tmp_path / "plain", "-n", 1, "--steps", 2, "--out", tmp_path / "out", "--trajectory")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"generated_0000.png", "contact_sheet.png", "trajectory.png"}
    assert "regions=1" in refused("segment", tmp_path / "plain", photos / "images/00.png", "--out", tmp_path / "s")


def test_evaluate_prints_one_table_and_keeps_the_scores(run, photos, ask, answer, refused):
    words = ("evaluate", run, "--images", photos / "images", "--masks", photos / "masks", "--fit", 20)
    code, out, _ = ask(*words, "--baselines")
    kept = json.loads((run / "scores.json").read_text())
    assert code == 0 and kept["scored"] == 4 and kept["fitted_on"] == 20
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert rows["model"] == [f"{kept[key]:.3f}" for key in ("acc", "iou", "dice")]
    names = [name.replace("_", " ") for name in BASELINES]
    assert [name for name in rows if name in names] == names
    assert rows["mean mask"] == [f"{kept['baselines']['mean_mask'][key]:.3f}" for key in ("acc", "iou", "dice")]
    assert answer(*words) == json.loads((run / "scores.json").read_text())
    assert "fit=24" in refused(*words[:-1], 24)


def test_evaluate_ignores_the_value_it_is_told_to(run, photos, answer, tmp_path):
    """Masks whose every object pixel is ignored leave nothing to find: the all-foreground predictor scores 0."""
    for path in (photos / "masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)), 128, 0).astype(np.uint8)).save(tmp_path / path.name)
    words = ("evaluate", run, "--images", photos / "images", "--masks", tmp_path, "--fit", 20, "--baselines")
    assert answer(*words, "--ignore", 128)["baselines"]["all_foreground"]["acc"] == 0
    assert answer(*words)["baselines"]["all_foreground"]["acc"] > 0


def test_prepare_decodes_what_training_will_read(photos, answer, ask, tmp_path):
    (photos / "images" / "broken.png").write_bytes(b"no picture")
    try:
        found = answer("prepare", photos, "--resolution", 16)
        assert list(found["skipped"]) == ["broken.png"] and found["images"] + found["held_out"] == 24
        entries = set(Path(os.environ["FACTORKIT_CACHE"]).rglob("images.npy"))
        assert Path(found["path"]) / "images.npy" in entries
        assert ask(*flags(steps=1), "--data", photos, "--out", tmp_path / "run")[0] == 0
        assert set(Path(os.environ["FACTORKIT_CACHE"]).rglob("images.npy")) == entries, "training decoded them again"
    finally:
        (photos / "images" / "broken.png").unlink()


def test_the_demo_says_when_it_failed_and_when_not(ask, answer, monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "demo", SMALL)
    monkeypatch.setattr("factorkit.segdiff.train.procedural_dataset", partial(procedural_dataset, train=16, test=8))
    out = tmp_path / "demo"
    found = answer("demo", "--out", out, "--seed", 3)
    assert found["iou"] < 0.8 and any("below the demo's mark" in failure for failure in found["failures"])
    assert len(found["failures"]) > 1, "four steps set off alarms too"
    assert {"acc", "dice", "seconds"} <= set(found) and Path(found["report"]).is_file()
    assert len(list((out / "segmented").glob("*_labels.png"))) == 8
    assert len(list((out / "generated").glob("*_labels.png"))) == 16
    _, text, _ = ask("demo", "segdiff", "--out", out, "--seed", 3)
    assert "FAILED" in text and all(failure in text for failure in found["failures"]) and "centre disc" in text
    monkeypatch.setattr(commands, "DEMO_MARK", 0.0)
    monkeypatch.setattr(commands, "failures", lambda folder: [])
    _, text, _ = ask("demo", "--out", out, "--seed", 3)
    assert "It worked" in text and "FAILED" not in text


def test_doctor_reports(ask, answer):
    assert answer("doctor")["torch"]["version"] == torch.__version__
    assert torch.__version__ in ask("doctor")[1]


# --- examples ---


def example(name: str, monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_examples_run(run, photos, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "fast64", SMALL)
    example("train_on_a_folder.py", monkeypatch, photos, "trained")
    assert "IoU 0." in capsys.readouterr().out
    example("segment_and_generate.py", monkeypatch, run, photos / "images/00.png")
    assert Image.open("region_1.png").mode == "RGBA" and Image.open("generated_3.png").size == (16, 16)
