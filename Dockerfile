# docker build --tag oprd .                                                               without CUDA
# docker build --tag oprd:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .          with CUDA; docker run --gpus all …
# docker run --rm --volume "$PWD:/work" oprd train --config mine.yaml
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
COPY locks locks
RUN python -m venv /opt/oprd \
    && /opt/oprd/bin/pip install --require-hashes --no-deps --no-build-isolation -r locks/run.txt \
    && /opt/oprd/bin/pip install --index-url "${TORCH_INDEX}" -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY comparisons comparisons
RUN /opt/oprd/bin/pip install --no-deps --no-build-isolation .

FROM python:${PYTHON}-slim
COPY --from=build /opt/oprd /opt/oprd
RUN useradd --create-home --uid 1000 oprd && mkdir /work && chown oprd /work
ENV PATH=/opt/oprd/bin:$PATH
USER oprd
WORKDIR /work
ENTRYPOINT ["oprd"]
CMD ["--help"]
