#!/bin/sh
# `--connect` of the published image's script: true once the server takes connections over TCP.
exec mariadb --host=127.0.0.1 --protocol=tcp --user=healthcheck --execute="SELECT 1"
