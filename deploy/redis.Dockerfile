# Debian's redis-server with the user ids of the official image, so that both can be run by the same docker-compose.yml.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
RUN groupadd --gid 1000 redis && useradd --uid 999 --gid redis --home-dir /data --shell /usr/sbin/nologin redis \
    && apt-get update && apt-get install -y --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/* \
    && install -d -o redis -g redis /data
USER redis
WORKDIR /data
VOLUME /data
EXPOSE 6379
HEALTHCHECK --interval=2s --timeout=3s --retries=15 CMD redis-cli ping | grep -q PONG
CMD ["redis-server", "--dir", "/data"]
