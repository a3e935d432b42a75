"""Train a model: python train.py experiment=wfvae_tiny data.root=VIDEOS out=RUN."""

from praxino.cli import train

if __name__ == "__main__":
    train()
