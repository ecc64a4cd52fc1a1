"""Blur and rates of S-CFG written out in float64, without a function of the library."""

import math

import torch
from torch.nn import functional as F


def blurred(x):
    """3 x 3 Gaussian with exp(-1) beside 1, reflecting, over the last two axes."""
    kernel = torch.tensor([math.exp(-1), 1, math.exp(-1)], dtype=torch.float64)
    kernel = torch.outer(kernel, kernel)[None, None] / kernel.sum() ** 2
    flat = x.double().reshape(-1, 1, *x.shape[-2:])
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="reflect"), kernel).reshape(x.shape)


def region_rates(norm, labels, foreground=None, top=15 / 4):
    """(b, f, H, W) from norms of the difference and the labels of the same shape."""
    rate = torch.empty_like(norm)
    for row in range(len(norm)):
        base = norm[row] if foreground is None else norm[row][foreground[row]]
        for token in labels[row].unique():
            inside = labels[row] == token
            rate[row][inside] = (base.mean() / norm[row][inside].mean()).clamp(0.8, 3.0)
    return blurred(rate).clamp(max=top)
