"""A run directory of a tiny denoiser and its tiny VAE, with random weights, as training leaves it."""

from pathlib import Path
from typing import Any

import torch

from dit_training import make_dit, make_net
from praxino import checkpoint
from praxino.lit.dit import DiTModule
from praxino.models.vae import VideoVAE
from praxino.models.wfvae import WFVAE

FRAMES, SIZE = 9, 16  # trained on, allegedly: latents of 3 x 3 x 2 x 2


def make_vae(seed: int = 0) -> VideoVAE:
    """Return a VAE of stride 4, 8, 8 and three channels, which knows the statistics of its latents."""
    torch.manual_seed(seed)
    hidden = {"encoder_energy_flow_hidden_size": 8, "decoder_energy_flow_hidden_size": 8}
    vae = WFVAE(latent_dim=3, base_channels=8, norm_type="layernorm", **hidden)
    vae.initialize("fan_in")
    vae.set_statistics([0.1, -0.2, 0.0], [0.5, 0.6, 0.7])
    return vae.eval()


def make_run(run: Path, net: dict[str, Any] | None = None, **module: Any) -> Path:
    """Write a run of `DiTModule(net=make_net(**net), **module)`."""
    vae = make_vae()
    (run / "checkpoints").mkdir(parents=True)
    checkpoint.save_vae(vae, run / "vae.ckpt")
    options = {"patch": (1, 1, 1), "classes": None, **(net or {})}
    trained: DiTModule = make_dit(net=make_net(**options), **module)
    place = {"fingerprint": checkpoint.fingerprint(vae), "path": "vae.ckpt", "absolute": str(run / "vae.ckpt")}
    trained.attach(vae, {**place, "stride": list(vae.stride)})
    trained.shape = [3, vae.latent_frames(FRAMES), SIZE // 8, SIZE // 8]
    trained.fps = 24.0
    trained.classes = ["cat", "cow", "dog"][: trained.net.classes] if trained.net.classes else None
    state = {f"net.{key}": value for key, value in trained.net.state_dict().items()}
    block = {**trained.describe(), "config": None, "step": 1}
    torch.save({"state_dict": state, "praxino": block}, run / "checkpoints" / "step-00000001.ckpt")
    return run
