"""The command line: in this process through `main(argv)`, and by subprocess where a process matters."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from factorkit.cli.base import SYNONYMS
from factorkit.cli.generate import Generate
from factorkit.cli.main import COMMANDS, command_class
from factorkit.cli.train import training_options
from factorkit.data import draw_flowers
from factorkit.utils.files import read_log

ROOT = Path(__file__).resolve().parents[2]


# --- help and mistakes ---


@pytest.mark.slow
def test_help_and_errors_need_no_torch():
    script = """if True:
        import sys
        from factorkit.cli.main import COMMANDS, main
        assert main(["--help"]) == main([]) == 0
        assert all(main([name, "--help"]) == 0 for name in COMMANDS if name != "train")
        assert main(["segment", "--help"]) == main(["evaluate", "--help-advanced"]) == 0
        assert main(["segment", "run", "--out", "x"]) == main(["generate", "run"]) == main(["sgement"]) == 2
        assert not {"torch", "matplotlib", "numpy", "PIL"} & set(sys.modules), "something heavy was imported"
    """
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    for name in COMMANDS:
        assert f"\n    {name} " in output.stdout
    assert "NAME_overlay.png" in output.stdout and "RUN PATHS..." in output.stdout


def test_unknown_command_suggests_similar_ones(run_refused):
    assert "Did you mean segment" in run_refused("segmnt", "x")
    assert "train" in run_refused("nonsense")


def test_misspelt_option_suggests_similar_ones(run_refused):
    message = run_refused("train", "segdiff", "--batchsize", 3)
    assert message.startswith("--batchsize is not an option of factorkit train segdiff. Did you mean --batch-size")
    message = run_refused("train", "segdiff", "--steps", "x")
    assert "Error parsing --steps" in message
    assert not set("│╭╰─\x1b") & set(message) and "---" not in message, "the frame is not removed"


@pytest.mark.parametrize(
    ("command", "option", "suggestion"),
    [
        (
            "train segdiff",
            "--epochs",
            "Use --steps. One step is one batch; an epoch is the number of images divided by",
        ),
        ("train segdiff", "--num_steps", "Use --steps."),
        ("train segdiff", "--lr", "Use --learning-rate."),
        ("train segdiff", "--batch", "Use --batch-size."),
        ("train segdiff", "--image-size", "Use --resolution."),
        ("train segdiff", "--workers", "Use --threads."),
        ("train segdiff", "--save-dir", "Use --out."),
        ("train segdiff", "--resume", "The same command with the same --out resumes the run."),
        ("train segdiff", "--width", "Use --model-channels."),
        ("train segdiff", "--no-mirror", "Use --no-random-flip."),
        ("train nerfdiff", "--cameras", "Use --num-candidates."),
        ("segment", "--num-workers", "Use --workers."),
        ("segment", "--output", "Use --out."),
        ("segment", "--checkpoint", "RUN has no option name: write it as a plain argument."),
        ("generate", "--num-samples", "Use --count."),
        ("generate", "--sampel", "Did you mean --sampler"),
        ("evaluate", "--fit", "Use --num-fit-images."),
    ],
)
def test_foreign_option_name_suggests_ours(run_refused, command, option, suggestion):
    message = run_refused(*command.split(), option, 3)
    name = option.replace("_", "-")
    assert message.startswith(f"{name} is not an option of factorkit {command}. {suggestion}")
    assert message.endswith(f"All options: factorkit {command} --help")


def test_suggested_options_exist():
    known = set()
    for name in COMMANDS:
        command = command_class(name)
        if name == "train":
            known |= {f.name for model in ("segdiff", "nerfdiff") for f in fields(training_options([model], False)[1])}
        known |= {field.name for field in fields(command)}
    missing = [option for option, _, _ in SYNONYMS if option and option.replace("-", "_") not in known]
    assert not missing, f"no command has these options: {missing}"


def test_basic_options_exist_and_are_few():
    for name in COMMANDS:
        commands = [command_class(name)]
        if name == "train":
            commands = [training_options([model], False)[1] for model in ("segdiff", "nerfdiff")]
        for command in commands:
            assert set(command.BASIC) <= {field.name for field in fields(command)}
            assert len(command.BASIC or fields(command)) <= 17, name


def test_train_unknown_model_is_refused(run_refused):
    for command in ("train", "demo"):
        message = run_refused(command, "nerf")
        assert "nerf" in message and "segdiff" in message
    assert "Did you mean nerfdiff? Name the model to train first: segdiff " in run_refused("train", "nerfdif")
    assert run_refused("train").startswith("Name the model to train first: segdiff ")
    for model in ("segdiff", "nerfdiff"):
        assert f"factorkit train {model} --help" in run_refused("train", model, "--nothing")


def test_help_with_preset_shows_its_defaults(run_cli, run_refused):
    code, thesis, _ = run_cli("train", "segdiff", "--preset=flowers64", "--help")
    _, own_data, _ = run_cli("train", "segdiff", "--data", "photos", "--help")
    assert code == 0 and "(default: thesis)" in thesis and "(default: 50000)" in thesis
    assert "(default: 64)" in own_data and "(default: regional)" in own_data  # fast64
    assert "Did you mean flowers" in run_refused("train", "segdiff", "--preset", "flowers99")
    assert "'fats' is unknown. Did you mean fast? Choose one of demo, " in run_refused(
        "train", "nerfdiff", "--preset=fats"
    )


def test_help_shows_negations_and_keeps_lists(run_cli):
    _, page, _ = run_cli("train", "segdiff", "--help")
    assert "--dry-run " in page and "--no-dry-run" not in page
    _, page, _ = run_cli("train", "segdiff", "--help-advanced")
    assert "--random-flip, --no-random-flip" in page and "--dry-run" not in page
    assert "\n    verify   read" in run_cli("checkpoint", "--help")[1]
    assert "list of finished images\n\nWith --formats" in run_cli("segment", "--help")[1]


def test_error_shows_traceback_only_with_debug(run_cli, monkeypatch, tmp_path):
    mistake = ("segment", tmp_path / "nowhere", "x.jpg", "--out", tmp_path / "out")
    assert "Traceback" not in run_cli(*mistake)[2]
    assert "Traceback" in run_cli(*mistake, "--debug")[2]
    monkeypatch.setenv("FACTORKIT_DEBUG", "1")
    code, _, err = run_cli(*mistake)
    assert code == 2 and "Traceback" in err and "nowhere" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "runs/x"), 1, ("runs/x", "Free some space")),
        (PermissionError(13, "Permission denied", "/root/x"), 2, ("/root/x", "permissions")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried much."), 1, ("--micro-batch-size", "CUDA out of memory")),
        (KeyboardInterrupt(), 130, ("interrupt",)),
        (torch.distributed.DistBackendError("Duplicate GPU\nat x.cpp"), 1, ("unreachable", "(Duplicate GPU)")),
    ],
)
def test_machine_errors_have_message_and_exit_code(run_cli, monkeypatch, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Generate, "execute", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("factorkit.cli.main.join_processes", lambda command: None)
    result, out, err = run_cli("generate", "run", "--out", "x", "--json")
    assert result == code and "Traceback" not in err
    assert all(word in err and word in json.loads(out)["error"] for word in words)


def test_bug_raises_with_traceback(run_cli, monkeypatch):
    monkeypatch.setattr(Generate, "execute", lambda command: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("generate", "run", "--out", "x")


def test_stdout_has_only_the_result(run_cli, monkeypatch):
    def generate_with_warnings(*args, **kwargs):
        print("a library's remark")
        warnings.warn("one image is broken", stacklevel=2)
        return {"answer": 42}, "the answer is 42"

    monkeypatch.setattr(Generate, "execute", generate_with_warnings)
    words = ("generate", "run", "--out", "x")
    for flag, out in ((), "the answer is 42\n"), (("--json",), '{"answer": 42}\n'):
        code, output, errors = run_cli(*words, *flag)
        assert code == 0 and output == out
        assert errors == "a library's remark\nwarning: one image is broken\n"


# --- train ---


@pytest.mark.slow
def test_train_writes_run_with_scores(run, photos, run_json, run_cli, flags):
    settings = json.loads((run / "config.json").read_text())
    assert settings["steps"] == 4 and settings["channel_mult"] == [1, 2] and settings["preset"] == "demo"
    assert settings["prediction"] == "v", "settings without a flag follow the form"
    again = run_json(*flags(), "--data", photos, "--out", run)
    assert [event["event"] for event in read_log(run)].count("start") == 1, "the same command resumes"
    assert again["scores"]["iou"] == json.loads((run / "scores.json").read_text())["iou"]
    assert Path(again["report"]).is_file() and Path(again["run"]) == run
    code, out, _ = run_cli(*flags(), "--data", photos, "--out", run)
    assert code == 0 and f"{again['scores']['iou']:.3f}" in out and str(run / "report.html") in out


def test_train_impossible_settings_are_refused(run, photos, run_refused, flags):
    assert "model_channels" in run_refused(*flags(model_channels=16), "--data", photos, "--out", run)
    assert "regions=0" in run_refused(*flags(regions=0), "--out", "new")
    assert "resolution=17" in run_refused(*flags(resolution=17), "--out", "new")
    assert "nowhere" in run_refused(*flags(), "--data", "nowhere", "--out", "new")
    assert not Path("new").exists()


@pytest.mark.slow
def test_holdout_takes_number_or_word(photos, run_json, flags):
    dry = (*flags(steps=1), "--data", photos, "--dry-run")
    assert run_json(*dry, "--holdout", 7)["held_out"] == 7
    assert run_json(*dry, "--holdout", "none")["images"] == 24


@pytest.mark.slow
def test_dry_run_estimates_and_writes_nothing(run_cli, run_json, flags):
    result = run_json(*flags(), "--dry-run", "--out", "new")
    assert result["parameters"] > 1000 and result["images_per_second"] > 0
    assert result["seconds"] == pytest.approx(4 * 4 / result["images_per_second"] + result["stage_seconds"])
    text = run_cli(*flags(regions=None), "--dry-run")[1]
    assert "images/s" in text and "for finding the objects first" in text
    assert "regions 2 or 3, by the images; estimated with 3" in text
    assert not list(Path().iterdir())


def test_dry_run_of_nerfdiff_prints_the_stages(run_cli, run_json, monkeypatch):
    stages = [{"name": "search", "steps": 600, "views_per_second": 8.0, "seconds": 75.0}]
    estimate = {"preset": "fast", "views": 80, "parameters": 2_000_000, "memory_gib": 0.5, "device": "cpu"}
    estimate |= {"stages": stages, "seconds": 75.0, "notes": []}
    settings = {}

    def fake_estimate(data, **options):
        settings.update(options)
        return estimate

    monkeypatch.setattr("factorkit.nerfdiff.train.estimate", fake_estimate, raising=False)
    words = ("train", "nerfdiff", "--preset", "fast", "--resolution", 16, "--dry-run")
    assert run_json(*words) == estimate
    assert (settings["preset"], settings["resolution"]) == ("fast", 16)
    assert (settings["layout"], settings["masks"], settings["loss_masks"], settings["fov"]) == (
        "auto",
        None,
        None,
        None,
    )
    run_json(*words, "--layout", "object", "--masks", "m", "--loss-masks", "l", "--fov", 40)
    assert (settings["layout"], settings["masks"], settings["fov"]) == ("object", "m", 40.0)
    assert settings["loss_masks"] == Path("l")
    text = run_cli(*words)[1]
    assert "2.00 M parameters" in text
    assert "search       75 seconds for 600 steps, 8.0 views/s" in text
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_sigterm_saves_and_same_command_resumes(tmp_path, run_cli, flags):
    out = tmp_path / "run"
    np.save(tmp_path / "data.npy", draw_flowers(8, 16)[0])
    words = [*flags(steps=100_000), "--data", str(tmp_path / "data.npy"), "--out", str(out)]
    command = [sys.executable, "-m", "factorkit", *words, "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(event["event"] == "step" for event in read_log(out)) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "the same command resumes" in json.loads(output)["error"] and "Traceback" not in errors
    reached = max(event["step"] for event in read_log(out) if event["event"] == "step")
    assert run_cli(*words, "--steps", reached + 1)[0] == 0
    assert [event["step"] for event in read_log(out) if event["event"] == "step"] == list(range(1, reached + 2))


def test_ctrl_c_reports_what_is_saved(run_cli, run, monkeypatch, flags):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("factorkit.segdiff.train.train_segdiff", interrupt)
    code, _, err = run_cli(*flags(), "--out", run)
    assert code == 130 and str(run) in err and "checkpoint is saved" in err
    code, _, err = run_cli(*flags(), "--out", "new")
    assert code == 130 and "nothing was saved" in err


def test_generate_defaults_equal_those_of_the_library():
    from factorkit.cli.generate import Generate
    from factorkit.segdiff.sampling import DEFAULT_SAMPLER, DEFAULT_STEPS

    defaults = {field.name: field.default for field in dataclasses.fields(Generate)}
    assert (defaults["sampler"], defaults["steps"]) == (DEFAULT_SAMPLER, DEFAULT_STEPS)
