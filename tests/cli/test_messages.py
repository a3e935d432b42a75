"""Wrong command lines end with exit code 2 and at most three lines that name what is wrong and what would be right."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from praxino import cli

ROOT = Path(__file__).resolve().parents[2]
TINY = ["experiment=wfvae_tiny", "trainer.max_steps=1"]

BAD = [
    ("train", ["experiment=wfvae_s"], "data.root: a value is required"),
    ("train", ["experiment=wfvae_tinyy", "data.root={here}/videos"], "did you mean wfvae_tiny"),
    ("train", [*TINY, "data.root={here}/vidoes"], "did you mean {here}/videos"),
    ("train", [*TINY, "data.root={here}/videos", "framess=17"], "framess: unknown key; did you mean frames"),
    ("train", [*TINY, "data.root={here}/videos", "trainer.max_stepz=5"], "did you mean trainer.max_steps"),
    (
        "train",
        [*TINY, "data.root={here}/videos", "max_steps=5"],
        "max_steps: unknown key; did you mean trainer.max_steps",
    ),
    ("train", [*TINY, "data.root={here}/videos", "model.net.base_chanels=8"], "did you mean model.net.base_channels"),
    ("train", [*TINY, "data.root={here}/videos", "+model.net.base_chanels=8"], "did you mean base_channels"),
    ("train", [*TINY, "data.root={here}/videos", "frames=seventeen"], "frames: 'seventeen'"),
    ("train", [*TINY, "data.root={here}/videos", "seed=-1"], "seed: -1: input should be greater than or equal to 0"),
    ("train", [*TINY, "data.root={here}/videos", "out=null"], "out: None: input should be a valid string"),
    ("train", [*TINY, "data.root={here}/videos", "trainer.val_check_interval=0"], "trainer.limit_val_batches=0 never"),
    ("train", [*TINY, "data.root={here}/videos", "threads=0"], "threads: 0: input should be greater than 0"),
    ("train", [*TINY, "data.root={here}/videos", "frames=16"], "use 1 + 4k, e.g. 13 or 17"),
    ("train", [*TINY, "data.root={here}/videos", "size=60"], "use multiples of 8"),
    (
        "train",
        ["experiment=wfvae_tiny_gan", "data.root={here}/videos", "model/adversary=patch2d", "size=16"],
        "use 24 pixels",
    ),
    (
        "train",
        [*TINY, "data.root={here}/videos", "model/lpips=random", "size=8"],
        "are too small for LPIPS with vgg: use 16",
    ),
    (
        "train",
        [*TINY, "data.root={here}/videos", "model/lpips=null"],
        "model/lpips=null: a group takes the name of a choice",
    ),
    ("train", [*TINY, "data.root={here}/videos", "launcher=slurm"], "pip install 'praxino[slurm]'"),
    ("train", [*TINY, "data.root={here}/videos", "trainer.precision=bf17"], "trainer.precision: 'bf17'"),
    ("train", [*TINY, "data.root={here}/videos", "data.short=stretch"], "data.short: 'stretch'"),
    ("train", [*TINY, "data.root={here}/videos", "model.loss._target_=os.system"], "os.system is not allowed"),
    (
        "train",
        [*TINY, "data.root={here}/videos", "model.net._target_=praxino.models.wfvae.WFVEA"],
        "did you mean WFVAE",
    ),
    ("train", [*TINY, "data.root={here}/videos", "trainer=gpuu"], "trainer=gpuu: no such choice; did you mean gpu"),
    ("train", [*TINY, "data.root={here}/videos", "seed=${{nope}}"], "nope"),
    ("train", [*TINY, "data.root={here}/videos", "ckpt=last"], "ckpt=last: "),
    (
        "train",
        [*TINY, "data.root={here}/videos", "weights={here}/none.ckpt"],
        "weights: {here}/none.ckpt does not exist",
    ),
    (
        "train",
        [*TINY, "data.root={here}/videos", "+trainer.gradient_clip_val=1"],
        "clip and accumulate are keys of model",
    ),
    ("train", [*TINY, "data.root=[{here}"], "cannot be read as key=value"),
    ("train", [*TINY, "data.root={here}/videos", "--epochs=3"], "epochs=..."),
    ("train", [*TINY, "data.root=a,b"], "data.root"),
    ("reconstruct", ["vae={here}", "out={here}/out"], "input: a value is required"),
    ("reconstruct", ["vae={here}", "input={here}/videos", "out={here}/videos/out"], "lies inside"),
    ("reconstruct", ["vae={here}", "input={here}", "out=o", "frames=many"], "frames: 'many'"),
    ("reconstruct", ["vae={here}", "input={here}", "out=o", "chunks=4"], "did you mean chunk"),
    ("evaluate", ["out={here}/out"], "give vae=PATH data.root=DIR, or real=DIR fake=DIR"),
    ("evaluate", ["ckpt={here}", "vae={here}", "out={here}/out"], "these do not go together: give vae=PATH"),
    ("evaluate", ["real={here}", "fake={here}", "out=o", "fvd.detectr=x"], "did you mean fvd.detector"),
    ("evaluate", ["real={here}", "fake={here}", "out=o", "metrics=[psnr,sim]"], "'sim' is unknown; did you mean ssim"),
    ("evaluate", ["real={here}", "fake={here}", "out=o", "protocol=wfve"], "did you mean wfvae"),
    ("evaluate", ["ckpt={here}", "input={here}/nin", "out=o"], "input: {here}/nin does not exist"),
    ("evaluate", ["real={here}", "fake={here}/fkae", "out=o"], "fake: {here}/fkae does not exist"),
    ("evaluate", ["vae={here}/videos", "data.root={here}", "out={here}/out"], "{here}/videos"),
    ("plot", ["run={here}/vidoes"], "did you mean {here}/videos"),
    ("plot", ["run=[{here}/videos,{here}/none]", "out=a.png"], "run: {here}/none does not exist"),
    ("plot", ["run=[{here}/videos,{here}/videos]"], "out: a value is required"),
    ("plot", ["run={here}", "smooth=2"], "smooth: 2: input should be less than or equal to 0.5"),
    ("make_video", ["input={here}/videos", "out=a.jpg"], "ends in .mp4"),
    ("make_video", ["input={here}/videos", "out=a.mp4", "fsp=3"], "did you mean fps"),
    ("import_config", ["{here}/none.json", "out=a.yaml"], "input: {here}/none.json does not exist"),
    ("import_config", ["{here}/videos", "out=a.yaml"], "cannot be read as JSON"),
    ("import_config", ["{here}/videos", "out=a.txt"], "ends in .yaml"),
    ("params", ["experiment=wfvae_tinyy"], "did you mean wfvae_tiny"),
    ("params", ["experiment=wfvae_tiny", "frames=16"], "use 1 + 4k, e.g. 13 or 17"),
    ("params", ["experiment=wfvae_tiny", "model.net.base_chanels=8"], "did you mean model.net.base_channels"),
    ("embed_text", ["captions={here}", "encoder={here}/none", "out=o"], "encoder: {here}/none does not exist"),
    ("embed_text", ["captions={here}", "encoder={here}", "out=o", "batch=0"], "batch=0: use 1 or more"),
    ("doctor", ["data.root={here}/vidoes", "out=o"], "did you mean {here}/videos"),
    ("doctor", ["data.root={here}", "out=o", "size=null"], "size=null"),
]


@pytest.mark.parametrize(("task", "arguments", "expected"), BAD, ids=[f"{t}-{a[-1]}" for t, a, _ in BAD])
def test_bad_command_line(
    task: str,
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "videos").mkdir()
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(here=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [f"{task}.py", *filled])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as caught:
        getattr(cli, task)()
    error = capfd.readouterr().err.strip()
    assert expected.format(here=tmp_path) in error
    assert len(error.splitlines()) <= 3
    assert "Traceback" not in error
    assert caught.value.code in ((2, 3) if "evaluate" in task and "vae" in arguments[0] else (2,))


def test_settings_may_stand_around_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "-m", "size=8,16", "--cfg", "job", "frames=5"])
    cli.check_flags()
    assert sys.argv == ["train.py", "seed=1", "size=8,16", "frames=5", "-m", "--cfg", "job"]


def test_help_is_readable_and_needs_no_torch() -> None:
    for script in ("train.py", "reconstruct.py", "evaluate.py"):
        code = f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
        code += f"try: runpy.run_path({script!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        code += "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout
        assert "out=DIR" in done.stdout
        assert len(done.stdout.splitlines()) < 60


def test_a_failing_process_prints_no_traceback() -> None:
    command = [sys.executable, "train.py", "experiment=wfvae_tiny", "data.root=/nonexistent/videos"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: data.root: /nonexistent/videos does not exist")
    assert len(done.stderr.strip().splitlines()) == 1
