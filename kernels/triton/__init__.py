"""The GPU kernels, in Triton: one source for NVIDIA and AMD. Imported by `dispatch.triton_module` on first use."""
