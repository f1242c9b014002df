"""Synthetic recordings, for trying the program and testing it where no real data is at hand.

Five pseudo-datasets of gait-like signals. They differ as real ones do: how the device sits on the body, sampling rate,
noise, range and calibration; their subjects differ in cadence, vigour and posture. Nothing measured on them says
anything about people, and every output that shows such a number says SYNTHETIC.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from harlora.data.recording import STANDARD_GRAVITY, Interval, Recording
from harlora.data.streams import align

SUBJECTS = 8
SECONDS = 45.0  # of each activity of each subject


@dataclass(frozen=True)
class Domain:
    """What sets one pseudo-dataset apart.

    rotation_deg: yaw, pitch and roll of the device on the body.
    noise: standard deviation, m/s² and rad/s. clip_g: range of the accelerometer. gain: its calibration error.
    own_clocks: the two sensors sample apart, irregularly, and drop samples, as phones do.
    """

    placement: str
    rate_hz: float
    rotation_deg: tuple[float, float, float]
    noise: tuple[float, float]
    clip_g: float
    gain: float
    own_clocks: bool = False


DOMAINS = {
    "synthetic_a": Domain("waist", 50.0, (0.0, 0.0, 0.0), (0.15, 0.02), 4.0, 1.00),
    "synthetic_b": Domain("front pocket", 100.0, (90.0, 20.0, 10.0), (0.30, 0.05), 8.0, 1.02),
    "synthetic_c": Domain("chest", 25.0, (0.0, 70.0, 180.0), (0.10, 0.02), 2.0, 0.98),
    "synthetic_d": Domain("waist", 64.0, (180.0, 0.0, 30.0), (0.60, 0.10), 4.0, 1.01),
    "synthetic_e": Domain("back pocket", 40.0, (-90.0, -30.0, 0.0), (0.25, 0.04), 2.0, 0.97, own_clocks=True),
}


@dataclass(frozen=True)
class _Activity:
    """Posture and gait.

    down: direction of gravity in the body's frame (forward, left, up), as pitch and roll in degrees.
    step_hz: steps a second, 0 if still. bounce: m/s², vertical, of the first harmonics of the step. swing: rad/s.
    """

    pitch: float
    roll: float
    step_hz: float = 0.0
    bounce: tuple[float, ...] = ()
    swing: float = 0.0


_ACTIVITIES = {
    "sit": _Activity(pitch=-25.0, roll=0.0),
    "stand": _Activity(pitch=0.0, roll=0.0),
    "lie": _Activity(pitch=-85.0, roll=15.0),
    "walk": _Activity(3.0, 0.0, 1.85, (2.6, 1.1, 0.5, 0.2), 0.9),
    "upstairs": _Activity(12.0, 0.0, 1.55, (1.9, 0.9, 0.2), 1.1),
    "downstairs": _Activity(-4.0, 0.0, 1.95, (2.9, 1.9, 1.2, 0.7), 0.8),
    "run": _Activity(8.0, 0.0, 2.70, (8.0, 3.0, 1.2, 0.5), 1.8),
}


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation matrix from angles in degrees, z then y then x."""
    a, b, c = np.deg2rad([yaw, pitch, roll])
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    return z @ y @ x


def _signal(
    activity: _Activity, domain: Domain, person: np.random.Generator, seconds: float, device: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    time = np.arange(round(seconds * domain.rate_hz)) / domain.rate_hz
    body = _rotation(0.0, activity.pitch + person.normal(0, 4), activity.roll + person.normal(0, 3))
    accel = np.zeros((len(time), 3))
    gyro = np.zeros((len(time), 3))
    # Nobody is quite still: breath and sway below 0.4 Hz.
    for axis in range(3):
        sway = 2 * np.pi * person.uniform(0.1, 0.4) * time + person.uniform(0, 2 * np.pi)
        accel[:, axis] += person.uniform(0.02, 0.08) * np.sin(sway)
        gyro[:, axis] += person.uniform(0.005, 0.02) * np.cos(sway)
    if activity.step_hz:
        cadence = activity.step_hz * person.normal(1.0, 0.06)
        vigour = person.normal(1.0, 0.12)
        drift = 0.05 * np.cumsum(person.normal(0, 1, len(time))) / np.sqrt(domain.rate_hz)
        phase = 2 * np.pi * cadence * time + drift  # of a step; a stride, left and right, is two
        for harmonic, size in enumerate(activity.bounce, start=1):
            offset = person.uniform(-0.4, 0.4)
            accel[:, 2] += vigour * size * np.sin(harmonic * phase + offset)
            accel[:, 0] += 0.45 * vigour * size * np.sin(harmonic * phase + offset + 1.3)
            accel[:, 1] += 0.35 * vigour * size * np.sin(harmonic * phase / 2 + offset)
        for axis, share in enumerate((0.5, 1.0, 0.6)):
            gyro[:, axis] += vigour * activity.swing * share * np.sin(phase / 2 + person.uniform(0, 2 * np.pi))
            gyro[:, axis] += 0.3 * vigour * activity.swing * share * np.sin(phase + person.uniform(0, 2 * np.pi))
    accel[:, 2] += STANDARD_GRAVITY  # at rest an accelerometer measures one g upwards
    rotation = device @ body.T
    accel = accel @ rotation.T * domain.gain + person.normal(0, domain.noise[0], accel.shape)
    gyro = gyro @ rotation.T + person.normal(0, 0.01, 3) + person.normal(0, domain.noise[1], gyro.shape)
    limit = domain.clip_g * STANDARD_GRAVITY
    return np.clip(accel, -limit, limit).astype(np.float32), gyro.astype(np.float32)


def _through_own_clocks(
    accel: np.ndarray, gyro: np.ndarray, rate_hz: float, person: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The two signals sampled by clocks of their own, and put back on a common one."""
    even = np.arange(len(accel)) / rate_hz
    sampled = []
    for signal, start, rate in ((accel, 0.0, 1.1 * rate_hz), (gyro, 0.13, 0.9 * rate_hz)):
        times = np.arange(start, even[-1], 1 / rate)
        times = np.clip(times + person.normal(0, 0.1 / rate, len(times)), 0, even[-1])
        times = times[person.random(len(times)) > 0.02]
        sampled += [times, np.stack([np.interp(times, even, signal[:, axis]) for axis in range(3)], axis=1)]
    ((_, accel, gyro),) = align(*sampled, rate_hz=rate_hz, longest_gap_s=1.0)
    return accel, gyro


def read(name: str) -> Iterator[Recording]:
    """The recordings of one pseudo-dataset, the same every time."""
    domain = DOMAINS[name]
    for subject in range(1, SUBJECTS + 1):
        person = np.random.default_rng([zlib.crc32(name.encode()), subject])
        device = _rotation(*(np.array(domain.rotation_deg) + person.normal(0, 8, 3)))
        for label, activity in _ACTIVITIES.items():
            accel, gyro = _signal(activity, domain, person, SECONDS, device)
            if domain.own_clocks:
                accel, gyro = _through_own_clocks(accel, gyro, domain.rate_hz, person)
            yield Recording(
                dataset=name,
                subject=str(subject),
                placement=domain.placement,
                rate_hz=domain.rate_hz,
                accel=accel,
                gyro=gyro,
                intervals=(Interval(0, len(accel), label),),
                source=f"subject {subject}, {label}",
            )
