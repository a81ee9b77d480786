"""The C kernels for the CPU, the Triton kernels for CUDA, and the operations that use them or plain torch."""
