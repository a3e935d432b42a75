"""Encode and decode videos: python reconstruct.py vae=RUN input=VIDEOS out=DIR."""

from praxino.cli import reconstruct

if __name__ == "__main__":
    reconstruct()
