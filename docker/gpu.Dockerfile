# The trainer on NVIDIA GPUs. The wheels bring CUDA's libraries; the host brings the driver and NVIDIA's container
# toolkit.
#   docker build -f docker/gpu.Dockerfile -t agro-lightning:gpu .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/app/runs" -v "$PWD/configs:/app/configs" \
#     agro-lightning:gpu fit --config configs/gsm8k_qwen3.yaml
FROM python:3.11-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# triton compiles its launcher with a C compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/agro
COPY constraints.txt ./
RUN torch="$(grep '^torch==' constraints.txt)" \
    && python -m pip install -c constraints.txt "$torch" \
    && python -c "import torch; assert torch.version.cuda, 'the index served a CPU build of torch'"
COPY pyproject.toml README.md LICENSE ./
COPY agro_lightning ./agro_lightning
COPY kernels ./kernels
RUN python -m pip install -c constraints.txt '.[lora,math]' && useradd --create-home --uid 1000 agro
WORKDIR /app
RUN chown agro /app
USER 1000
ENTRYPOINT ["python", "-m", "agro_lightning"]
CMD ["--help"]
