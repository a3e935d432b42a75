"""Measure a VAE or two folders: python evaluate.py vae=RUN data.root=VIDEOS out=DIR."""

from praxino.cli import evaluate

if __name__ == "__main__":
    evaluate()
