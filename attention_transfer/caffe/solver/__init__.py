"""Caffe's solvers: the training loop, the nets it names, the learning rate, and what each type subtracts."""
