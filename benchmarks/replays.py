"""Puts videos side by side into one small GIF for the README.

python benchmarks/replays.py hub/ppo-LunarLander-v3/replay.mp4 hub/ppo-CartPole-v1/replay.mp4 --out docs/replays.gif
"""

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import tyro
from PIL import Image


def main(films: tyro.conf.Positional[list[Path]], out: Path, seconds: float = 8, height: int = 160, fps: int = 10):
    """Write the first `seconds` of each video side by side.

    Args:
        films: videos that imageio can read.
        out: the GIF.
        seconds: length of the GIF.
        height: height of the GIF, in pixels.
        fps: frames per second of the GIF.
    """
    columns = []
    for film in films:
        frames = imageio.imread(film)
        moments = np.arange(seconds * fps) / fps * imageio.immeta(film)["fps"]
        frames = frames[np.minimum(moments.astype(int), len(frames) - 1)]  # its last frame stays
        size = round(height * frames.shape[2] / frames.shape[1]), height
        columns.append([Image.fromarray(frame).resize(size) for frame in frames])
    gif = [Image.fromarray(np.hstack(frames)).quantize(64) for frames in zip(*columns)]
    gif[0].save(out, save_all=True, append_images=gif[1:], duration=1000 // fps, loop=0, optimize=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.partition("\n")[0])
