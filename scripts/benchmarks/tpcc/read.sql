\set w random(1, :W)
\set d random(1, 10)
\set c random(1, 300)
select o_id, o_carrier_id from orders where o_w_id = :w and o_d_id = :d and o_c_id = :c order by o_id desc limit 1;
select count(*) from stock where s_w_id = :w and s_quantity < 15;
