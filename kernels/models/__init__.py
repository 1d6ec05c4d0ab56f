"""The fast models: the operators of `refllm.kernels` under every family and head, behind `refllm.load(backend=...)`.

pages.py       the forward pass of a family in fused operators
operators.py   what a page calls: a backend's operators, `linear`, and `tap` to name values
torch_forms.py the operators of backend="torch": Torch's own fused functions where it has any
weights.py     the tensors, loaded straight to the device, with q, k, v and gate, up in one matrix each
cache.py       the KV cache in preallocated tensors; decode.py a step of decoding that a CUDA graph repeats
fast_model.py  what a call does around a page
"""
