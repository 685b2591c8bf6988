\set a random(1, 5)
begin;
select id from mx where id = :a for key share;
update mx set v = v + 1 where id = :a;
end;
