"""The command line: light to start, clear when something is wrong, exit codes that scripts can rely on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pennyweight.cli import app
from tests.gpt_oss import CHILD, PARENT

QUICK = (
    *("--context-tokens", "64", "--calibration-rows", "4", "--score-rows", "2", "--held-out-rows", "2"),
    *("--heal-tokens", "0", "--local-tokens", "0", "--machine", "m2-max", "--prompt", "32", "--new", "16"),
    *("--text", str(Path(__file__).parent)),
)


def penny(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_help_and_import_load_neither_torch_nor_transformers():
    code = (
        "import sys, pennyweight, pennyweight.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(pennyweight.cli.app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(pennyweight.cli.app, ['fit', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_needs_no_torch_and_prints_the_published_numbers(tmp_path):
    (tmp_path / "parent.json").write_text(json.dumps(PARENT))
    (tmp_path / "child.json").write_text(json.dumps(CHILD))
    code = (
        "import sys; from typer.testing import CliRunner; from pennyweight.cli import app\n"
        "out = CliRunner().invoke(app, sys.argv[1:]); print(out.output); assert 'torch' not in sys.modules\n"
        "sys.exit(out.exit_code)\n"
    )
    arguments = ["plan", "child.json", "--against", "parent.json", "--prompt", "64k", "--new", "64k"]
    arguments += ["--machine", "h100"]  # another computer: nothing is measured
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in ("88.150 B", "292.5 MiB", "2692.5 MiB", "41.6%", "40.7%"):
        assert number in done.stdout, number
    parent = penny("plan", tmp_path / "parent.json", "--machine", "h100")
    assert "116.829 B" in parent.stdout


def test_plan_as_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PARENT))
    found = json.loads(penny("plan", tmp_path, "--memory", "80GiB", "--machine", "h200", "--json").stdout)
    assert found["parameters"] == 116_829_156_672
    assert found["verdict"].startswith(("fits", "does not fit"))


def test_fit_check_eval_report(pico, tmp_path):
    out = tmp_path / "small"
    done = penny("fit", pico("qwen3"), "--weights", "35%", "--out", out, *QUICK)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(out)
    checked = penny("check", out)
    assert checked.exit_code == 0 and checked.stdout.splitlines()[-1].startswith(("3 of 3 passed", "2 of 2 passed, 1"))
    for stage in ("slots", "load model", "greedy tokens", "layer by layer", "native engine"):
        assert f"{stage}: done in" in checked.stderr
    judged = penny("eval", out, "--against", pico("qwen3"), "--rows", 2, "--context-tokens", 64, "--json")
    for stage in ("load model", "text", "load parent", "agreement"):
        assert f"{stage}: done in" in judged.stderr
    found = json.loads(judged.stdout)
    assert found["agreement"]["kl"] > 0
    assert found["bits_per_byte"] > 0
    page = penny("report", out, "--out", tmp_path / "page.html").stdout.strip()
    assert "<html" in Path(page).read_text()


def test_local_tasks_of_every_layout(pico, tmp_path):
    lines = [
        {"query": "Question: two and two?\n", "choices": ["four", "five"], "gold": 0},
        {"context_options": ["He ran so he", "She ran so she"], "continuation": "was tired.", "gold": 1},
        {"context": "2+2=", "continuation": "4"},
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ("eval", pico("llama"), "--rows", 1, "--context-tokens", 64, "--json")
    done = penny(*arguments, "--task-file", tmp_path / "tasks.jsonl")
    assert "tasks.jsonl: done in" in done.stderr
    found = json.loads(done.stdout)
    task = found["tasks"]["tasks.jsonl"]
    assert task["items"] == 3
    assert task["chance"] == pytest.approx(1 / 3)
    (tmp_path / "wrong.jsonl").write_text('{"question": "?"}')
    wrong = penny(*arguments, "--task-file", tmp_path / "wrong.jsonl")
    assert wrong.exit_code == 2
    assert "no known task layout" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("fit", "MODEL", "--out", "OUT"), 2, "a budget is needed"),
        (("fit", "MISSING", "--weights", "30%", "--out", "OUT"), 2, "nowhere does not exist"),
        (("fit", "MODEL", "--weights", "1%", "--out", "OUT", *QUICK), 3, "the least possible is"),
        (("fit", "MODEL", "--memory", "lots", "--out", "OUT"), 2, "is not a size"),
        (("fit", "MODEL", "--weights", "0%", "--out", "OUT"), 2, "above 0"),
        (("fit", "MODEL", "--weights", "30%", "--axes", "magic", "--out", "OUT"), 2, "no variants called 'magic'"),
        (("fit", "MODEL", "--weights", "30%", "--search", "luck", "--out", "OUT"), 2, "no search called 'luck'"),
        (("fit", "MODEL", "--weights", "30%", "--machine", "abacus", "--out", "OUT"), 2, "no machine 'abacus'"),
        (("fit", "MODEL", "--weights", "30%", "--text", "MISSING", "--out", "OUT"), 2, "does not exist"),
        (("fit", "MODEL", "--weights", "30%", "--config", "BAD", "--out", "OUT"), 2, "buget"),
        (("plan", "MISSING"), 2, "nowhere does not exist"),
        (("report", "MODEL"), 2, "report.json does not exist"),
    ],
)
def test_what_is_wrong_is_said_with_the_right_exit_code(arguments, code, says, pico, tmp_path):
    (tmp_path / "bad.yaml").write_text("buget: {memory: 3GiB}\n")
    places = {
        "MODEL": pico("llama"),
        "MISSING": tmp_path / "nowhere",
        "OUT": tmp_path / "out",
        "BAD": tmp_path / "bad.yaml",
    }
    done = penny(*(places.get(str(a), a) for a in arguments))
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert len(done.stderr.splitlines()) < 25
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    done = penny("plan", tmp_path)
    assert done.exit_code == 2
    assert "'mamba9' is not supported" in done.stderr
    assert "llama" in done.stderr


def test_a_truncated_file_is_named_with_its_offset(pico, tmp_path):
    import shutil

    model = shutil.copytree(pico("llama"), tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = penny("fit", model, "--weights", "30%", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "model.safetensors" in done.stderr
    assert "truncated" in done.stderr


def test_print_config_is_a_config(pico, tmp_path):
    shown = penny(
        "fit", pico("llama"), "--weights", "30%", "--out", tmp_path / "o", "--seed", 5, "--print-config"
    ).stdout
    (tmp_path / "c.yaml").write_text(shown)
    again = penny(
        "fit", pico("llama"), "--out", tmp_path / "o", "--config", tmp_path / "c.yaml", "--print-config"
    ).stdout
    assert again == shown
    assert "seed: 5" in shown


def test_dry_run_writes_no_model(pico, tmp_path):
    done = penny("fit", pico("llama"), "--weights", "50%", "--out", tmp_path / "out", *QUICK, "--dry-run")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["choices"] > 0
    assert not (tmp_path / "out").exists()


def test_machine_lists_what_ships():
    assert {"h100", "h200", "a100", "rtx-4090", "m2-max", "epyc-zen4-2-cores"} <= set(
        penny("machine", "--list").stdout.split()
    )


def test_run_and_bench(pico):
    pytest.importorskip("pennyweight._native", reason="the native module was not built: no C++ compiler")
    folder = str(pico("qwen3"))
    command = ["run", folder, "hello", "--max-tokens", "12", "--threads", "1"]
    plain, told = penny(*command), penny(*command, "--json")
    assert plain.exit_code == told.exit_code == 0, plain.output
    found = json.loads(told.stdout)
    assert found["text"] == plain.stdout.removesuffix("\n") and found["tokens"] == 12 and found["finish"] == "length"
    for more in (["--lookup"], ["--draft", folder]):
        assert json.loads(penny(*command, "--json", *more).stdout)["text"] == found["text"]
    stop = found["text"][4]
    assert json.loads(penny(*command, "--json", "--stop", stop).stdout)["finish"] == "stop"
    measured = json.loads(penny("bench", folder, "--prompt", "20", "--new", "5", "--threads", "1", "--json").stdout)
    assert 0 < measured["tpot_p05"] <= measured["tpot"] and measured["bytes_per_step"] > 0
    assert measured["energy"]
    forced = penny("bench", folder, "--prompt", "4", "--new", "2", "--threads", "99", "--force-threads", "--json")
    assert json.loads(forced.stdout)["threads"] == 99
    for wrong, said in (
        (["run", folder, "hello", "--top-p", "2"], "less than or equal to 1"),
        (["run", folder, "hello", "--cache", "int3"], "float16, int8 or float32"),
        (["run", folder, "hello", "--kernels", "sse"], "no kernels named sse"),
        (["run", folder, "hello", "--chat"], "no chat template"),
        (["run", folder, "hello " * 300], "tokens"),
        (["run", folder + "-not", "hello"], "not"),
        (["run", folder, "hello", "--threads", "4096"], "--force-threads"),
        (["run", folder, "hello", "--draft", folder, "--threads", "-1"], "greater than or equal to 0"),
        (["bench", folder, "--threads", "4096"], "processors this process may use"),
        (["serve", folder, "--port", "0", "--threads", "4096"], "--force-threads"),
        (["bench", folder, "--prompt", "300"], "256"),
    ):
        result = penny(*wrong)
        assert result.exit_code == 2 and said in result.stderr and len(result.stderr) < 1000, result.output


@pytest.mark.parametrize(
    ("arguments", "inside", "code"),
    [
        (("fit", "MODEL", "--weights", "50%", "--out", "OUT", *QUICK), "pennyweight.job.run.run_job", 75),
        (("demo", "--model", "MODEL", "--out", "OUT"), "pennyweight.job.run.run_job", 75),
        (("train", "RECIPE", "--books", "BOOKS", "--out", "OUT"), "pennyweight.train.train", 75),
        (("machine", "MODEL"), "pennyweight.prices.measure.machine", 75),
        (("machine", "MODEL", "--again"), "pennyweight.prices.measure.machine", 130),
        (("machine",), "pennyweight.prices.measure.machine", 130),
        (("plan", "MODEL", "--machine", "h100"), "pennyweight.prices.planning.plan", 130),
        (("eval", "MODEL", "--rows", "1", "--context-tokens", "64"), "pennyweight.evals.loss.loss", 130),
        (("check", "MODEL"), "pennyweight.job.checks.check_folder", 130),
        (("report", "REPORT"), "pennyweight.report.draw", 130),
        (("run", "MODEL", "x"), "pennyweight.runtime.model.open_model", 130),
        (("bench", "MODEL"), "pennyweight.runtime.engine.Engine", 130),
    ],
)
@pytest.mark.parametrize("stop", ["Ctrl-C", "disk full"])
def test_only_what_goes_on_says_so(arguments, inside, code, stop, pico, tmp_path, monkeypatch):
    """Stopped by Ctrl-C or a full disk, a command promises to go on only if it does."""
    (tmp_path / "report.json").write_text("{}")
    recipe = Path(__file__).parent.parent / "recipes" / "reference-dense.yaml"
    places = {"MODEL": pico("llama"), "OUT": tmp_path / "out", "REPORT": tmp_path, "RECIPE": recipe, "BOOKS": tmp_path}

    def stopped(*_, **__):
        raise KeyboardInterrupt if stop == "Ctrl-C" else OSError(errno.ENOSPC, "no space left", "file")

    monkeypatch.setattr(inside, stopped)
    done = penny(*(places.get(a, a) for a in arguments))
    assert done.exit_code == (code if stop == "Ctrl-C" or code == 75 else 2), done.output
    assert ("the same command goes on" in done.stderr) == (code == 75)


@pytest.mark.parametrize(
    "command", ["plan", "machine", "fit", "demo", "train", "eval", "check", "report", "run", "bench", "serve"]
)
def test_help_is_h_too(command):
    long, short = penny(command, "--help"), penny(command, "-h")
    assert short.exit_code == 0 and short.stdout == long.stdout


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_seen_enough_is_no_error(buffered, tmp_path):
    """As in `penny plan model | head -1`."""
    (tmp_path / "config.json").write_text(json.dumps(PARENT))
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "pennyweight", "plan", str(tmp_path)]
    command += ["--machine", "h100"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=kept) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_demo_fits_the_shipped_model(monkeypatch, tmp_path):
    """Which model, and how; the job itself takes minutes and is benchmarks/fit_demo.py."""
    from pennyweight.cli import making
    from pennyweight.disk.checkpoint import Checkpoint

    asked = {}
    monkeypatch.setattr(making, "_fit", lambda model, out, config, **rest: asked.update(model=model, config=config))
    assert penny("demo", "--out", tmp_path / "out").exit_code == 0
    assert Checkpoint(Path(asked["model"])).weight_bytes > 10**7
    assert asked["config"].budget.weights == "22%" and asked["config"].heal.whole_tokens > 0
