# For a CPU:       docker build --tag step3 .
# For NVIDIA GPUs: docker build --tag step3 --build-arg TORCH=cu130 .
# Then as in docs/elsewhere.md.

# Not `slim`, which has no compiler for torch.compile.
FROM python:3.12
ARG TORCH=cpu
WORKDIR /step3
COPY scripts/constraints.txt scripts/
RUN pip install --no-cache-dir --constraint scripts/constraints.txt --index-url https://download.pytorch.org/whl/$TORCH torch
COPY . .
RUN pip install --no-cache-dir --constraint scripts/constraints.txt --editable '.[serve]'
EXPOSE 8000
ENTRYPOINT ["step3"]
CMD ["serve", "checkpoints/step3-tiny", "--host", "0.0.0.0"]
