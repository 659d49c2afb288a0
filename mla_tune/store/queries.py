"""The SQL that reads a measurement database. Every query is of one ``:environment``."""

MEASUREMENTS = """
select p.site, p.num_reqs, p.num_qo_tokens, p.kv_tokens, p.role, m.* from measurements m join points p on p.id = m.point
where m.environment = :environment and (:site is null or p.site = :site)
order by p.site, p.num_reqs, p.num_qo_tokens, p.kv_tokens, m.candidate, m.part, m.regime
"""
KEYS = """
select p.site, p.num_reqs, p.num_qo_tokens, p.kv_tokens, m.candidate, m.part, m.regime, m.launches
from measurements m join points p on p.id = m.point
where m.environment = :environment and m.outcome <> 'disturbed'
"""
FAILURES = """
select p.site, p.num_reqs, p.num_qo_tokens, p.kv_tokens, p.role, m.* from measurements m join points p on p.id = m.point
where m.environment = :environment and m.outcome not in ('ok', 'disturbed') and not exists (
  select 1 from measurements other where other.environment = m.environment and other.point = m.point
  and other.candidate = m.candidate and other.outcome = 'ok'
)
order by p.site, p.num_reqs, p.num_qo_tokens, p.kv_tokens, m.candidate, m.part, m.regime
"""
QUARANTINE = """
select p.site, p.num_reqs, p.num_qo_tokens, p.kv_tokens, q.* from quarantine q join points p on p.id = q.point
where q.environment = :environment order by q.id
"""
TRIES = """
select * from tries where environment = :environment order by site, candidate, num_reqs, num_qo_tokens, kv_tokens
"""
LAUNCHES = "select * from launches where environment = :environment order by kernel, size_from"
OUTCOMES = """
select outcome, count(*) as measurements from measurements
where environment = :environment group by outcome order by outcome
"""
SPAN = """
select
  (select count(distinct point) from measurements where environment = :environment) as points,
  (select count(*) from tries where environment = :environment) as tries,
  (select coalesce(sum(length(samples_us)) / 8, 0) from quarantine where environment = :environment) as quarantined,
  (select min(finished_at) from all_times) as first,
  (select max(finished_at) from all_times) as last
"""
ALL_TIMES = """
with all_times as (
  select finished_at from measurements where environment = :environment
  union all select finished_at from tries where environment = :environment
)
"""
