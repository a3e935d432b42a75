"""Derive the figures of this directory from the reference material: `python tests/golden/make.py ../shared/golden`."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
SETS = {"wfvae_c4_ln": ["img"], "wfvae_888_c4": ["img", "t9"]}
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
