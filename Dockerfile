# Serves bundles on CPUs, without PyTorch.
#   docker build -t cla-export .
#   docker run -p 8000:8000 -v "$PWD/my-bundle:/bundle:ro" cla-export --allow-no-key
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cla_export cla_export
RUN python -m venv /opt/cla-export \
 && /opt/cla-export/bin/pip install --no-cache-dir --no-deps . \
 && /opt/cla-export/bin/python -m cla_export.deploy.image cpu serve > requirements.txt \
 && /opt/cla-export/bin/pip install --no-cache-dir -r requirements.txt

FROM python:3.11-slim-bookworm
# The attention operator is compiled for the processor it runs on, at the first start, into $HOME.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cla-export /opt/cla-export
ENV PATH=/opt/cla-export/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["cla-export", "serve", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
