# The environment of every entry point and nothing else: each job brings the project's code. The plugin builds the
# image when this file or requirements.lock has changed. By hand: docker build --tag image-classifier .
ARG BASE=python:3.11-slim-bookworm
FROM $BASE

# Root is not needed, and a job may run as any user: home and the cache are open to all.
RUN useradd --create-home --uid 1000 job \
 && mkdir -m 1777 /cache \
 && chmod 1777 /home/job
# Output arrives line by line, nothing is reported to anyone, git is not missed, and a GPU shows its use.
ENV HOME=/home/job \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The locked torch is the CUDA build, which computes on a CPU what it computes everywhere. DEVICE=cpu (5.1 GB instead of
# 6.8) leaves out what only a computing GPU loads: the parts of cuDNN, Triton's compilers, device code and profilers.
# The libraries that torch itself is linked with have to stay. Build it so where no job asks for a GPU.
ARG DEVICE=cuda
COPY requirements.lock /opt/environment/
RUN case "$DEVICE" in cpu|cuda) ;; *) echo "error: DEVICE is '$DEVICE'; allowed: cpu, cuda" >&2; exit 2 ;; esac \
 && python -m pip install --no-cache-dir --root-user-action=ignore --require-hashes -r /opt/environment/requirements.lock \
 && if [ "$DEVICE" = cpu ]; then \
        cd "$(python -c 'import torch; print(torch.__path__[0])')/.." \
     && rm -rf nvidia/cudnn/lib/libcudnn_* nvidia/cu13/lib/libcusolverMg.* nvidia/cu13/lib/libnvperf_* \
            nvidia/nvshmem/lib/*.bc nvidia/nvshmem/lib/*.a \
            triton/backends/amd/lib triton/backends/nvidia/bin triton/backends/nvidia/lib triton/instrumentation \
     && python -c 'import torch, torchvision; torch.nn.Conv2d(3, 8, 3)(torch.ones(1, 3, 8, 8)).sum().backward()'; \
    fi

USER 1000
WORKDIR /home/job
