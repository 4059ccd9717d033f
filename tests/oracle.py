"""The networks of Table 3 in plain, slow NumPy: what they must compute, written a second time."""

import numpy as np


def relu(x):
    """max(x, 0)."""
    return np.maximum(x, 0)


def conv(x, kernel, bias, *, stride=1):
    """VALID cross-correlation; x [H, W, in], kernel [kh, kw, in, out]."""
    kh, kw = kernel.shape[:2]
    height, width = (x.shape[0] - kh) // stride + 1, (x.shape[1] - kw) // stride + 1
    out = np.zeros((height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            patch = x[i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[i, j] = np.tensordot(patch, kernel, axes=3)
    return out + bias


def transposed(x, kernel, bias):
    """VALID transposed convolution; x [H, W, in], kernel [kh, kw, out, in]."""
    kh, kw = kernel.shape[:2]
    out = np.zeros((x.shape[0] + kh - 1, x.shape[1] + kw - 1, kernel.shape[2]))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i : i + kh, j : j + kw] += kernel @ x[i, j]
    return out + bias


def upsample_and_pad(x):
    """Each pixel four times, then two rows and columns of zeros all around."""
    return np.pad(x.repeat(2, axis=0).repeat(2, axis=1), ((2, 2), (2, 2), (0, 0)))


def _weights(layer):
    return np.asarray(layer.kernel, np.float64), np.asarray(layer.bias, np.float64)


def encoder(network, image):
    """Moments of the latents of one image [H, W, 1]."""
    features = image
    for layer, stride in zip(network.trunk, (2, 1, 1, 2, 1, 1), strict=True):
        features = relu(conv(features, *_weights(layer), stride=stride))
    return {name: conv(features, *_weights(head)) for name, head in network.heads.items()}


def decoder(network, z):
    """Moments of the pixels for one z [h, w, D]."""
    features = relu(conv(z, *_weights(network.input_layer)))
    for layer in network.low:
        features = relu(transposed(features, *_weights(layer)))
    features = relu(conv(upsample_and_pad(features), *_weights(network.middle)))
    for layer in network.high:
        features = relu(transposed(features, *_weights(layer)))
    features = upsample_and_pad(features)
    return {
        "y_mean": conv(features, *_weights(network.mean_head)),
        "y_log_precision": conv(features, *_weights(network.log_precision_head)),
    }


def prior_network(network, omega):
    """Moments of the clusters for one omega [h, w, dim_omega], [h, w, D, K]."""
    features = relu(conv(omega, *_weights(network.hidden)))
    shape = (*omega.shape[:2], network.dim_z, network.num_clusters)
    return {
        "prior_mean": conv(features, *_weights(network.mean_head)).reshape(shape),
        "prior_log_precision": conv(features, *_weights(network.log_precision_head)).reshape(shape),
    }
