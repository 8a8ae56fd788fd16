"""Attention transfer's loss as a Python layer of Caffe, for maps Y_s and Y_t of length 1.

    layer {
      type: "Python" bottom: "norm_s" bottom: "norm_t" top: "at_loss"
      loss_weight: 1  # a Python layer has none of its own
      propagate_down: true propagate_down: false
      python_param { module: "attention_loss" layer: "AttentionLoss" param_str: "{\\"beta\\": 1}" }
    }

The value is beta / 2 times the sum over samples of ||Y_s - Y_t||_2, each map taken as one vector; with
"normalization": "BATCH_SIZE" in param_str it is the mean over samples. Where both maps of a sample are equal,
its gradient is 0. Needs a Caffe built WITH_PYTHON_LAYER, with this file on PYTHONPATH; Python 2.7 or 3.
"""

import json

import caffe
import numpy as np

MODES = ("SUM", "BATCH_SIZE")


class AttentionLoss(caffe.Layer):
    def setup(self, bottom, top):
        settings = json.loads(self.param_str or "{}")
        self.beta = float(settings.get("beta", 1.0))
        self.mode = settings.get("normalization", "SUM")
        if len(bottom) != 2 or len(top) != 1:
            raise ValueError("AttentionLoss: expected two bottoms, student and teacher, and one top.")
        if self.mode not in MODES:
            raise ValueError("AttentionLoss: expected a normalization SUM or BATCH_SIZE, got %s." % self.mode)

    def reshape(self, bottom, top):
        student, teacher = bottom[0].data, bottom[1].data
        if student.shape[0] != teacher.shape[0] or student.size != teacher.size:
            shapes = (student.shape, teacher.shape)
            raise ValueError("AttentionLoss: expected maps of equal size, got %s and %s." % shapes)
        top[0].reshape()  # a scalar, as the losses of Caffe are

    def forward(self, bottom, top):
        samples = bottom[0].data.shape[0]
        self.factor = self.beta / 2 / (samples if self.mode == "BATCH_SIZE" else 1)
        self.difference = (bottom[0].data.astype(np.float64) - bottom[1].data).reshape(samples, -1)
        self.distance = np.sqrt((self.difference**2).sum(axis=1, keepdims=True))
        top[0].data[...] = self.factor * self.distance.sum()

    def backward(self, top, propagate_down, bottom):
        weight = float(top[0].diff.ravel()[0])
        equal = self.distance == 0
        slope = weight * self.factor * self.difference / np.where(equal, 1, self.distance)
        for index, sign in ((0, 1), (1, -1)):
            if propagate_down[index]:
                bottom[index].diff[...] = sign * slope.reshape(bottom[index].data.shape)
