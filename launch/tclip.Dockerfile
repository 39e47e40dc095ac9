# The image of `tclip launch gke`. The build context has the wheel and, if there is one, the recipe file:
#   tclip launch wheel --out image
#   docker build --file launch/tclip.Dockerfile --build-arg "PACKAGE=$(echo /tclip/*.whl)[tpu,gcs]" image
FROM python:3.12-slim
ARG PACKAGE
WORKDIR /tclip
COPY . .
RUN pip install --no-cache-dir "$PACKAGE"
