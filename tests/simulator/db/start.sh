#!/bin/sh
# Runs PostgreSQL in the foreground; the first time, it makes the cluster, the schema and the seed data.
#
#   PGDATA                          the cluster's directory; its parent must be writable
#   PGUSER, PGPASSWORD, PGDATABASE  the owner and the database of the application
#   TASKBOARD_SEED                  the files of seed/ to load, in this order (users board)
#   TASKBOARD_LISTEN                the addresses to listen on (all)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
fresh=$PGDATA.new

load() {
    psql --no-psqlrc --quiet --output=/dev/null --set=ON_ERROR_STOP=1 --single-transaction --file="$here/$1"
}

create_cluster() {
    rm -rf "$fresh" "$fresh.password"
    (umask 077 && printf '%s\n' "$PGPASSWORD" > "$fresh.password")
    initdb --pgdata="$fresh" --username="$PGUSER" --pwfile="$fresh.password" --auth=scram-sha-256 \
        --encoding=UTF8 --locale=C.UTF-8 > /dev/null
    rm "$fresh.password"
    echo 'host all all all scram-sha-256' >> "$fresh/pg_hba.conf"
}

# The server that loads the data listens on a socket only, so that nobody takes the database for ready too early.
fill_cluster() {
    pg_ctl --pgdata="$fresh" --silent --log="$fresh/first-start.log" \
        --options="-c listen_addresses='' -c unix_socket_directories='$fresh'" start
    trap 'pg_ctl --pgdata="$fresh" --silent --mode=immediate stop' EXIT
    (
        export PGHOST="$fresh"
        createdb
        load schema.sql
        for seed in ${TASKBOARD_SEED:-users board}; do
            load "seed/$seed.sql"
        done
    )
    pg_ctl --pgdata="$fresh" --silent --mode=fast stop
    trap - EXIT
}

# The finished cluster is moved to its place in one step: an interrupted first start begins anew.
if [ ! -d "$PGDATA" ]; then
    create_cluster
    fill_cluster
    mv "$fresh" "$PGDATA"
fi
exec postgres -D "$PGDATA" -c listen_addresses="${TASKBOARD_LISTEN-*}" -c unix_socket_directories="$PGDATA"
