//! Changes of every kind, and what they left.

use postgres::Client;

/// A moment of a database.
pub struct Moment {
    /// Where its WAL ended.
    pub lsn: String,
    /// When it was.
    pub time: String,
    /// What its permanent tables held.
    pub digests: Vec<(String, i64, String)>,
}

/// Notes this moment.
pub fn note_moment(client: &mut Client) -> Moment {
    let digests = permanent(client);
    let row = client
        .query_one(
            "select pg_current_wal_lsn()::text,
                    to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
            &[],
        )
        .unwrap();
    Moment { lsn: row.get(0), time: row.get(1), digests }
}

/// One step of a mixed run of DDL and DML.
pub fn step(client: &mut Client, number: usize) {
    let statements = match number % 10 {
        0 => format!(
            "create table t{number} (a int primary key, b text); insert into t{number} select g, repeat(md5(g::text), 5) from generate_series(1, 300) g"
        ),
        1 => "update t0 set b = b || 'x' where a % 3 = 0".to_owned(),
        2 => "delete from t0 where a % 7 = 0; vacuum t0".to_owned(),
        3 => format!(
            "create index on t0 (b); insert into t0 select g + 1000 * {number}, 'n' from generate_series(1, 500) g"
        ),
        4 => "alter table t0 add column if not exists c int default 5; update t0 set c = a"
            .to_owned(),
        5 => format!(
            "create table big{number} as select g a, random()::text b from generate_series(1, 3000) g; truncate t0; insert into t0 select g from generate_series(1, 50) g"
        ),
        6 => "vacuum full t0; create sequence if not exists s; select nextval('s')".to_owned(),
        7 => format!(
            "begin; insert into t0 select g + 100000 * {number} from generate_series(1, 20) g; savepoint a; delete from t0; rollback to a; commit"
        ),
        8 => format!(
            "create materialized view m{number} as select count(*) n from t0; create unlogged table u{number} (a int); insert into u{number} values (1)"
        ),
        _ => format!("drop table if exists big{}; analyze; checkpoint", number - number % 10 + 5),
    };
    for statement in statements.split(';') {
        client.batch_execute(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}

/// A digest of every permanent table of the database, by name: equal digests, equal contents.
/// Unlogged ones are empty on a branch, by definition, and can't be read on a standby.
pub fn permanent(client: &mut Client) -> Vec<(String, i64, String)> {
    let tables = client
        .query(
            "select oid::regclass::text from pg_class
             where relkind = 'r' and relpersistence = 'p'
                   and relnamespace <> all ('{pg_catalog, information_schema}'::regnamespace[])
             order by 1",
            &[],
        )
        .unwrap();
    let mut digests = Vec::new();
    for table in tables {
        let name: String = table.get(0);
        let query = format!(
            "select count(*), coalesce(md5(string_agg(row::text, ',' order by row::text)), '')
             from (select t as row from {name} t) s"
        );
        let row = client.query_one(&query, &[]).unwrap();
        digests.push((name, row.get(0), row.get(1)));
    }
    digests
}
