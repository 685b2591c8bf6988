//! A compute may make and drop any number of relations, however many names it can remember.

#![allow(clippy::unwrap_used)]

use pgstrata_tests::{Cluster, thorough};

/// About ten names of files each time: two relations with all their forks, and what might come behind their ends.
const CHURN: &str = "create procedure churn(rounds int) language plpgsql as $$
    begin
        for i in 1..rounds loop
            create table passing (id int primary key);
            commit;
            drop table passing;
            commit;
        end loop;
    end $$";

#[test]
fn relations_come_and_go_without_end() {
    let cluster = Cluster::new();
    let mut client = cluster.client();
    client
        .batch_execute("create table staying as select i from generate_series(1, 1000) i")
        .unwrap();
    client.batch_execute("set synchronous_commit = off").unwrap();
    client.batch_execute(CHURN).unwrap();
    // More names than there is room for, or a taste of it.
    let rounds = if thorough() { 30_000 } else { 300 };
    client.batch_execute(&format!("call churn({rounds})")).unwrap();
    client.batch_execute("checkpoint; create table coming as table staying").unwrap();
    for table in ["staying", "coming"] {
        let row = client.query_one(&format!("select sum(i) from {table}"), &[]).unwrap();
        assert_eq!(row.get::<_, i64>(0), 500_500);
    }
    drop(client);
    // And what is left of it is there for the next one.
    cluster.cli(&["compute", "stop", "main"]);
    cluster.up();
    let row = cluster.client().query_one("select count(*) from coming", &[]).unwrap();
    assert_eq!(row.get::<_, i64>(0), 1000);
}
