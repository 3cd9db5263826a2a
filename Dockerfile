# m3jax and its dependencies for TPU hosts; docs/pod.md uses it. From a clean checkout:
#   docker build --tag=m3jax .
FROM python:3.13
WORKDIR /m3jax
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[tpu,gcs]'
