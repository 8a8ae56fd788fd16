"""Caffe's files: prototxt as text, caffemodel and the like as binary, and old forms upgraded on reading."""
