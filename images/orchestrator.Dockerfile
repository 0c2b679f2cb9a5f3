# The orchestrator: SuperLink, coordinator and the command line `fednnunet`. Built with no network from the wheelhouse: `make image`.
# Four layers over the base, the one that changes most often last: torch, libraries, the user, this project. A new
# version of this project changes the last one alone, and `fednnunet image save --since` sends just that.
ARG BASE_IMAGE=fednnunet/base:bookworm
ARG TOOLS_IMAGE=fednnunet/tools:bookworm

# hadolint ignore=DL3006
FROM ${TOOLS_IMAGE} AS tools
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python3 -m venv /opt/fednnunet
COPY images/install.sh /opt/install.sh

FROM tools AS torch
ARG TORCH=cpu
RUN --mount=type=bind,source=build/wheels,target=/wheels \
    /opt/install.sh /opt/torch "/wheels/${TORCH}/torch"

# What only reading images needs, or compiling, is the hospitals' part.
FROM tools AS libraries
ARG TORCH=cpu
RUN --mount=type=bind,source=build/wheels,target=/wheels \
    /opt/install.sh /opt/libraries "/wheels/${TORCH}/libraries" \
        imagecodecs networkx setuptools

FROM tools AS project
RUN --mount=type=bind,source=build/wheels,target=/wheels \
    /opt/install.sh /opt/fednnunet /wheels/project

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
ARG TORCH=cpu
RUN echo 'fednnunet:x:10001:' >>/etc/group \
 && echo 'fednnunet:x:10001:10001::/state:/usr/sbin/nologin' >>/etc/passwd \
 && mkdir /config /state \
 && chown 10001:10001 /config /state
COPY --from=torch /opt/torch /opt/torch
COPY --from=libraries /opt/libraries /opt/libraries
COPY --from=project /opt/fednnunet /opt/fednnunet
ENV PATH=/opt/fednnunet/bin:/opt/libraries/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/state \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    FEDNNUNET_STATE=/state \
    FEDNNUNET_FLEET_HOST=0.0.0.0
WORKDIR /state
USER 10001:10001
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 CMD ["orchestrator", "health"]
EXPOSE 8443
ENTRYPOINT ["tini", "--", "orchestrator"]
CMD ["start"]
ARG VERSION=0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="fednnunet-orchestrator" \
      org.opencontainers.image.description="SuperLink, coordinator and command line of a federation" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.fednnunet.torch="${TORCH}"
