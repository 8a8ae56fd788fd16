"""Maps of length 1 as a Python layer of Caffe, in place of the SSD fork's Normalize with across_spatial.

    layer {
      type: "Python" bottom: "map_s" top: "norm_s"
      python_param { module: "attention_normalize" layer: "Normalize" param_str: "{\\"eps\\": 1e-10}" }
    }

top = x / sqrt(sum of x^2 over the sample + eps). It has no scale, so there is nothing to freeze. Needs a
Caffe built WITH_PYTHON_LAYER, with this file on PYTHONPATH; Python 2.7 or 3.
"""

import json

import caffe
import numpy as np


class Normalize(caffe.Layer):
    def setup(self, bottom, top):
        settings = json.loads(self.param_str or "{}")
        self.eps = float(settings.get("eps", 1e-10))
        if len(bottom) != 1 or len(top) != 1:
            raise ValueError("Normalize: expected one bottom and one top.")

    def reshape(self, bottom, top):
        top[0].reshape(*bottom[0].data.shape)

    def forward(self, bottom, top):
        x = bottom[0].data.astype(np.float64).reshape(bottom[0].data.shape[0], -1)
        self.norm = np.sqrt((x**2).sum(axis=1, keepdims=True) + self.eps)
        self.unit = x / self.norm
        top[0].data[...] = self.unit.reshape(top[0].data.shape)

    def backward(self, top, propagate_down, bottom):
        if propagate_down[0]:
            gradient = top[0].diff.astype(np.float64).reshape(self.unit.shape)
            along = (self.unit * gradient).sum(axis=1, keepdims=True)
            bottom[0].diff[...] = ((gradient - self.unit * along) / self.norm).reshape(bottom[0].data.shape)
