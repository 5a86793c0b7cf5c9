"""Triton kernels, one module per op at ``<family>/<op>.py``: kernels, their tile configuration, the launcher."""

if __name__ == "triton_kernels":
    # OpenAI ships a package of this name: never shadow it when the working directory is this repository
    raise ImportError("this is tilefuse's kernel folder, import it as tilefuse.triton_kernels")
