"""Synthetic videos in the formats of the data sets, made once with ffmpeg into a cache folder.

A zooming fractal under a drifting, turning test card, blurred and with a little film noise: at each data set's own codec
settings the files come out about as large as the real ones (a 340 x 256 JPEG about 20 KB, 10 s of Kinetics 0.4 MB).
"""

import concurrent.futures
import json
import os
import shutil
import subprocess

import machine

# fps and seconds are those of the data set; a JPEG folder holds only 2 s so that the cache stays small.
KINDS = {
    "jpeg": dict(like="frame folders as MMAction2 and TSM extract them", width=340, height=256, fps=30, seconds=2, suffix="", codec=["-q:v", "2"]),
    "ucf": dict(like="UCF101", width=320, height=240, fps=25, seconds=7, suffix=".avi", codec=["-c:v", "libxvid", "-q:v", "5", "-g", "12"]),
    "kinetics": dict(like="Kinetics-400, shortened side 256", width=340, height=256, fps=30, seconds=10, suffix=".mp4", codec=["-c:v", "libx264"]),
    "something": dict(like="Something-Something V2", width=428, height=240, fps=12, seconds=4, suffix=".webm",
                      codec=["-c:v", "libvpx-vp9", "-b:v", "0", "-crf", "40", "-g", "128", "-deadline", "realtime", "-cpu-used", "5"]),
}
MAKER = 1  # raise when the content changes, so that an old cache is not taken for the new one


def command(kind, index, path):
    k = KINDS[kind]
    size, frames = f"{k['width']}x{k['height']}", k["fps"] * k["seconds"]
    fractal = f"mandelbrot=size={size}:rate={k['fps']}:start_x=-0.743{index:02}:start_scale=1.2:end_scale=0.2:end_pts={frames}:maxiter=200"
    mix = (f"[1]scale=iw/2:ih/2,rotate=(t+{index})/3[card];"
           f"[0][card]overlay=x='(W-w)/2+W/4*sin(t+{index})':y='(H-h)/2+H/4*cos(0.7*t)',gblur=sigma=1.5,noise=alls=5:allf=t:all_seed={index + 1},format=yuv420p")
    target = os.path.join(path, "img_%05d.jpg") if kind == "jpeg" else path
    return ["ffmpeg", "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", fractal, "-f", "lavfi", "-i", f"testsrc2=size={size}:rate={k['fps']}",
            "-filter_complex", mix, "-frames:v", str(frames), *k["codec"], "-threads", "1", target]


def make(folder, kind, videos):
    """The paths of `videos` videos of a kind, made where they are missing; RuntimeError says what is in the way."""
    here = os.path.join(folder, kind)
    paths = [os.path.join(here, f"{i:03}{KINDS[kind]['suffix']}") for i in range(videos)]
    note = os.path.join(here, "made.json")
    want = dict(maker=MAKER, **KINDS[kind])
    if os.path.exists(note):
        with open(note) as f:
            found = json.load(f)
        if {k: found.get(k) for k in want} == want and found["videos"] >= videos and all(map(os.path.exists, paths)):
            return paths
    if os.path.isdir(here):
        raise_unless_ours(here)
    if shutil.which("ffmpeg") is None:
        raise RuntimeError(f"{here} holds no {videos} videos yet and there is no ffmpeg to make them: install ffmpeg, or bring a cache folder made elsewhere")
    os.makedirs(here, exist_ok=True)

    def one(i):
        if kind == "jpeg":
            os.makedirs(paths[i], exist_ok=True)
        done = subprocess.run(command(kind, i, paths[i]), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ffmpeg could not make {paths[i]}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, range(videos)))
    machine.write_json(note, dict(want, videos=videos, mean_bytes=mean_bytes(paths)))
    return paths


def raise_unless_ours(here):
    """Older files of this script are made anew; a folder with anything else in it is left alone."""
    strangers = [n for n in os.listdir(here) if n != "made.json" and not os.path.splitext(n)[0].isdigit()]
    if strangers:
        raise RuntimeError(f"{here} holds {strangers[0]}, which this script did not make: name another cache folder")


def mean_bytes(paths):
    """Mean size of a video file, or of one frame of the frame folders."""
    files = [os.path.join(p, n) for p in paths for n in os.listdir(p)] if os.path.isdir(paths[0]) else paths
    return sum(map(os.path.getsize, files)) // len(files)
