# The trainer without a GPU: the quick start, tests, small models.
#   docker build -f docker/cpu.Dockerfile -t agro-lightning:cpu .
#   docker run --rm -v "$PWD/runs:/app/runs" agro-lightning:cpu fit
# Where the index serves torch's GPU build by default, name one of CPU builds: --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim-bookworm
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# triton compiles its launcher with a C compiler, also under the interpreter
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/agro
COPY constraints.txt ./
RUN torch="$(grep '^torch==' constraints.txt)" && python -m pip install -c constraints.txt "$torch"
COPY pyproject.toml README.md LICENSE ./
COPY agro_lightning ./agro_lightning
COPY kernels ./kernels
RUN python -m pip install -c constraints.txt '.[lora,math]' && useradd --create-home --uid 1000 agro
WORKDIR /app
RUN chown agro /app
USER 1000
ENTRYPOINT ["python", "-m", "agro_lightning"]
CMD ["--help"]
