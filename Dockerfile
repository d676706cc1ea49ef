# An image that trains; with --build-arg EXTRAS=dev it has what the tests need, too.
#
#   docker build -t qgalore .
#   docker run --rm qgalore bash scripts/quickstart.sh
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/qgalore/runs" qgalore bash scripts/single_gpu/llama_7b.sh
#
# TORCH is what pip installs as torch: on Linux the registry's default wheel brings CUDA along (scripts/env.sh).
# No image of this file has been built yet: the machines that the project is tested on have no docker daemon. The tests
# check its instructions, extras and paths.
FROM python:3.12-slim

# Triton compiles with a C compiler; data sets of the Hugging Face hub may need git.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev procps \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /qgalore
ARG TORCH="torch>=2.11"
RUN pip install --no-cache-dir "$TORCH"
COPY . .
ARG EXTRAS=train,plot
RUN pip install --no-cache-dir --editable ".[$EXTRAS]"

# Scripts take the python of the image as it is, and install nothing.
ENV NO_SETUP=1
CMD ["qgalore", "--help"]
