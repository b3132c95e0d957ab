"""ONNX files of export graphs: operations that stay whole while torch traces, and what they become."""
