"""The ways PyTorch users decode clips: torch's DataLoader over cv2, decord or torchcodec, and DALI's own pipeline.

All give the same clip for the same index: one random frame from each of T equal parts of the video, one random crop in
the manner of MultiScaleCrop for the whole clip, bilinear resize to 224, flip in half of the cases; `[T, 3, 224, 224]`.
"""

import os
import random

import numpy as np
import torch

SEGMENTS, SIZE = 8, 224
SCALES = (1, 0.875, 0.75, 0.66)
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


def recipe(index, frames, width, height):
    """(frame numbers, crop as x, y, w, h, flip); a pure function of the index, so all readers do the same work."""
    r = random.Random(index)
    part = frames / SEGMENTS
    numbers = [min(int((s + r.random()) * part), frames - 1) for s in range(SEGMENTS)]
    base = min(width, height)
    # Neighbouring scales only: the crop is at most one step away from square.
    i = r.randrange(len(SCALES))
    j = min(max(i + r.choice((-1, 0, 1)), 0), len(SCALES) - 1)
    w, h = int(base * SCALES[i]), int(base * SCALES[j])
    return numbers, (r.randint(0, width - w), r.randint(0, height - h), w, h), r.random() < 0.5


def frame_path(folder, number):
    return os.path.join(folder, f"img_{number + 1:05}.jpg")


def jpeg_cv2(folder, numbers, size):
    import cv2

    for n in numbers:
        with open(frame_path(folder, n), "rb") as f:
            yield cv2.cvtColor(cv2.imdecode(np.frombuffer(f.read(), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def video_cv2(path, numbers, size):
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    at = -1
    for n in numbers:
        while at < n:
            if not capture.grab():
                raise RuntimeError(f"{path} ends before frame {n}")
            at += 1
        yield cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    capture.release()


def video_decord(path, numbers, size):
    import decord

    return decord.VideoReader(path, num_threads=1).get_batch(numbers).asnumpy()


def video_torchcodec(path, numbers, size, seek_mode="exact"):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
    return decoder.get_frames_at(numbers).data.numpy()


def video_torchcodec_approximate(path, numbers, size):
    return video_torchcodec(path, numbers, size, "approximate")


JPEG = {"cv2": jpeg_cv2}
VIDEO = {"cv2": video_cv2, "decord": video_decord, "torchcodec": video_torchcodec, "torchcodec-approximate": video_torchcodec_approximate}


def why_missing(name):
    """None, or why this reader cannot be used here."""
    try:
        if name == "dali":
            import nvidia.dali  # noqa: F401
        elif name == "decord":
            import cv2  # noqa: F401  (resizes the frames of all but DALI)
            import decord  # noqa: F401
        elif name.startswith("torchcodec"):
            import cv2  # noqa: F401
            from torchcodec.decoders import VideoDecoder  # noqa: F401
        else:
            import cv2  # noqa: F401
    except Exception as e:  # a library that does not fit the installed torch or FFmpeg fails in its own ways
        return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}"
    return None


class Clips(torch.utils.data.Dataset):
    def __init__(self, paths, kind, read, as_float, length=1 << 30):
        self.paths, self.kind, self.read, self.as_float, self.length = paths, kind, read, as_float, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        import cv2

        width, height = self.kind["width"], self.kind["height"]
        numbers, (x, y, w, h), flip = recipe(i, self.kind["fps"] * self.kind["seconds"], width, height)
        out = []
        for frame in self.read(self.paths[i % len(self.paths)], numbers, (width, height)):
            frame = cv2.resize(frame[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
            out.append(cv2.flip(frame, 1) if flip else frame)
        clip = np.stack(out)
        if self.as_float:
            clip = (clip.astype(np.float32) - MEAN) * (1 / STD)
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2)))


def alone_in_core(_worker):
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def loader(paths, kind, name, is_jpeg, as_float, batch, workers):
    """An endless iterator of `[batch, T, 3, 224, 224]` from torch's DataLoader."""
    data = Clips(paths, kind, (JPEG if is_jpeg else VIDEO)[name], as_float)
    return iter(torch.utils.data.DataLoader(data, batch, num_workers=workers, prefetch_factor=2, worker_init_fn=alone_in_core, timeout=120))


def dali(paths, kind, is_jpeg, as_float, batch, threads):
    """The same batches from a DALI pipeline on the CPU: region-of-interest decoding for JPEG, chosen frames for video."""
    from nvidia.dali import fn, pipeline_def, types

    decode_video = getattr(fn.decoders, "video", None) or fn.experimental.decoders.video  # its name before and since DALI 2
    state = dict(next=0)

    def items():
        rows = []
        for i in range(state["next"], state["next"] + batch):
            numbers, (x, y, w, h), flip = recipe(i, kind["fps"] * kind["seconds"], kind["width"], kind["height"])
            path = paths[i % len(paths)]
            for name, n in [(frame_path(path, n), [n]) for n in numbers] if is_jpeg else [(path, numbers)]:
                common = (np.frombuffer(name.encode(), np.uint8), np.array([y, x], np.int32), np.array([h, w], np.int32), np.int32(flip))
                rows.append(common if is_jpeg else (*common, np.array(n, np.int32)))
        state["next"] += batch
        return [list(column) for column in zip(*rows)]

    @pipeline_def(batch_size=batch * SEGMENTS if is_jpeg else batch, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        name, anchor, shape, flip, *numbers = fn.external_source(source=items, num_outputs=4 if is_jpeg else 5)
        data = fn.io.file.read(name)
        if is_jpeg:
            frames = fn.decoders.image_slice(data, anchor, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False)
        else:
            frames = fn.slice(decode_video(data, frames=numbers[0]), anchor, shape, axis_names="HW", normalized_anchor=False, normalized_shape=False)
        frames = fn.resize(frames, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False)
        mean, std, dtype = (MEAN.tolist(), STD.tolist(), types.FLOAT) if as_float else ([0.0] * 3, [1.0] * 3, types.UINT8)
        return fn.crop_mirror_normalize(frames, mirror=flip, mean=mean, std=std, dtype=dtype, output_layout="CHW" if is_jpeg else "FCHW")

    pipe = pipeline()
    pipe.build()
    while True:
        (out,) = pipe.run()
        yield torch.from_numpy(np.array(out.as_tensor())).view(batch, SEGMENTS, 3, SIZE, SIZE)
