#!/bin/bash
# The published image's conventions, as far as services/ leans on them: user, password and database by variables, scripts
# once, a server without network while it is prepared, root only to own the data.
set -eu
if [ "${1#-}" != "$1" ]; then
    set -- mariadbd "$@"
fi
if [ "$(id -u)" = 0 ]; then
    chown -R mysql /var/lib/mysql
    exec setpriv --reuid=mysql --regid=mysql --clear-groups "$0" "$@"
fi

quoted() {
    local text=${1//\\/\\\\}
    printf "'%s'" "${text//\'/\\\'}"
}

socket=(--socket=/run/mysqld/mysqld.sock)
if [ ! -d /var/lib/mysql/mysql ]; then
    if [ -z "${MARIADB_ALLOW_EMPTY_ROOT_PASSWORD:-}" ]; then
        echo "Database is uninitialized and password option is not specified" >&2
        exit 1
    fi
    mariadb-install-db --datadir=/var/lib/mysql --skip-test-db --auth-root-authentication-method=normal > /dev/null
    "$@" "${socket[@]}" --skip-networking &
    server=$!
    until mariadb "${socket[@]}" --user=root --execute="SELECT 1" > /dev/null 2>&1; do
        kill -0 $server
        sleep 0.1
    done
    mariadb "${socket[@]}" --user=root << SQL
CREATE DATABASE IF NOT EXISTS \`$MARIADB_DATABASE\`;
CREATE USER '$MARIADB_USER'@'%' IDENTIFIED BY $(quoted "$MARIADB_PASSWORD");
GRANT ALL ON \`${MARIADB_DATABASE//_/\\_}\`.* TO '$MARIADB_USER'@'%';
CREATE USER 'healthcheck'@'127.0.0.1';
SQL
    for script in /docker-entrypoint-initdb.d/*; do
        case "$script" in
            *.sh) . "$script" ;;
            *.sql) mariadb "${socket[@]}" --user=root < "$script" ;;
        esac
    done
    kill $server
    wait $server
fi
exec "$@" "${socket[@]}"
