# SPDX-License-Identifier: Apache-2.0
# docker run -v /etc/fleece:/etc/fleece:ro -v fleece:/var/lib/fleece -p 10809:10809 fleece
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fleece fleece
COPY nbd nbd
RUN python -m venv --without-pip /opt/fleece \
 && pip --python /opt/fleece/bin/python install --no-cache-dir --disable-pip-version-check .

FROM python:3.11-slim
RUN groupadd --gid 10809 fleece \
 && useradd --uid 10809 --gid fleece --no-create-home --home-dir /var/lib/fleece fleece \
 && install -d -o fleece -g fleece /run/fleece /var/lib/fleece
COPY --from=build /opt/fleece /opt/fleece
# /run/fleece for the sockets and /var/lib/fleece for the state, as for root
ENV PATH=/opt/fleece/bin:$PATH XDG_RUNTIME_DIR=/run XDG_STATE_HOME=/var/lib
USER fleece
# Disk images, what survives a restart, and the overlays of snapshots
VOLUME /var/lib/fleece
EXPOSE 10809
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["fleece", "status"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fleece"]
CMD ["serve", "-c", "/etc/fleece/fleece.yaml"]
