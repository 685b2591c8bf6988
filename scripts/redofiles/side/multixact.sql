-- Row locks by several sessions, subtransactions too: multixacts.
\set id random(1, 5)
begin;
select id from mx where id = :id for key share;
savepoint s;
update mx set v = v + 1 where id = :id;
release s;
select id from mx where id = :id % 5 + 1 for share skip locked;
end;
