"""Derive the figures of this directory from the reference material: `python tests/golden/make.py ../shared/golden`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from praxino.models.causalvae import CausalVAE

HERE = Path(__file__).parent
SETS = {"wfvae_c4_ln": ["img"], "wfvae_888_c4": ["img", "t9"]}
CAUSAL = {"v10": "causalvae_v1.0_defaults", "v11": "causalvae_v1.1", "v12": "causalvae_v1.2_od"}
SMALL = {"hidden_size": 32, "hidden_size_mult": [1, 1, 1, 1], "num_res_blocks": 1}  # as in the golden sets
MANIFESTS = ["wfvae_S_4ch", "wfvae_S_8ch", "wfvae_L_16ch", "wfvae_M_32ch_888", "wfvae_class_defaults"]


def main(golden: Path) -> None:
    arrays, configs = {}, {}
    for name, tags in SETS.items():
        configs[name] = json.loads((golden / name / "config.json").read_text())
        inputs, outputs = (load_file(golden / name / f"{part}.safetensors") for part in ("input", "output"))
        for tag in tags:
            arrays[f"{name}.{tag}.input"] = inputs[tag]
            arrays |= {f"{name}.{k}": v for k, v in outputs.items() if k.split(".")[0] == tag and "logvar" not in k}
    np.savez_compressed(HERE / "wfvae.npz", **arrays)
    (HERE / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")
    manifests = {name: json.loads((golden / "manifests" / f"{name}.json").read_text()) for name in MANIFESTS}
    (HERE / "manifests.json").write_text(json.dumps(manifests, separators=(",", ":")) + "\n")
    manifests = {name: json.loads((golden / "manifests" / f"{file}.json").read_text()) for name, file in CAUSAL.items()}
    (HERE / "causalvae.json").write_text(json.dumps(manifests, separators=(",", ":")) + "\n")
    np.savez_compressed(HERE / "causalvae.npz", **causal_figures(manifests))


def causal_figures(manifests: dict[str, Any]) -> dict[str, np.ndarray]:
    """Compute figures of our own: the official videos are too large to keep. tests/parity judges them by those."""
    sys.path.insert(0, str(HERE.parent / "parity"))
    from conftest import draw_clip, fill

    arrays = {}
    for name, manifest in manifests.items():
        config = {key: value for key, value in manifest["config"].items() if not key.startswith("_")}
        vae = CausalVAE(**config | SMALL).eval()
        fill(vae)
        with torch.no_grad():
            posterior = vae.encode(draw_clip())
            arrays[f"{name}.moments"] = posterior.moments.numpy()
            arrays[f"{name}.decoded"] = vae.decode(posterior.mode())[..., ::2, ::2].numpy()
    return arrays


if __name__ == "__main__":
    main(Path(sys.argv[1]))
